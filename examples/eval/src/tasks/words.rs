//! The names, numbers and templates of the built-in evaluation tasks.
//!
//! They have a module of their own so that training data can be checked to share none of them:
//! see [`phrases`].

/// What a fact or a needle is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Value {
    /// A word out of a list.
    Word(&'static [&'static str]),
    /// A number with this many digits.
    Digits(usize),
}

/// A planted statement and the question about it.
///
/// `{who}` is a name, `{what}` a thing, `{value}` the answer. The answer stands at the end of
/// `opening` + answer; where it is a number, `opening` ends with a space, as most tokenizers give
/// that space a token of its own before digits; otherwise the space belongs to the answer.
#[derive(Debug, Clone, Copy)]
pub struct Template {
    /// The statement that is planted in the context.
    pub statement: &'static str,
    /// What is asked.
    pub question: &'static str,
    /// How the answer begins.
    pub opening: &'static str,
    /// What the answer is.
    pub value: Value,
    /// What `{what}` is drawn from; empty where the template has none.
    pub things: &'static [&'static str],
}

/// First names.
pub const NAMES: &[&str] = &[
    "Agnes",
    "Bertrand",
    "Clarissa",
    "Dmitri",
    "Esther",
    "Florian",
    "Gwendolyn",
    "Hector",
    "Imogen",
    "Jasper",
    "Katrina",
    "Leopold",
    "Matilda",
    "Nathaniel",
    "Ophelia",
    "Percival",
    "Quentin",
    "Rosalind",
    "Sebastian",
    "Tabitha",
    "Ulysses",
    "Veronica",
    "Winston",
    "Yolanda",
    "Zachary",
    "Beatrix",
    "Cornelius",
    "Dorothea",
    "Edmund",
    "Felicity",
    "Gideon",
    "Henrietta",
];

/// Towns.
pub const TOWNS: &[&str] = &[
    "Lisbon",
    "Oslo",
    "Nairobi",
    "Kyoto",
    "Prague",
    "Montreal",
    "Dublin",
    "Havana",
    "Cairo",
    "Zurich",
    "Bergen",
    "Seville",
    "Quito",
    "Helsinki",
    "Marrakesh",
    "Tallinn",
    "Salzburg",
    "Edinburgh",
    "Naples",
    "Wellington",
    "Santiago",
    "Budapest",
    "Antwerp",
    "Krakow",
];

/// Places where a thing can be hidden.
pub const HIDING_PLACES: &[&str] = &[
    "piano",
    "staircase",
    "bookcase",
    "fireplace",
    "mattress",
    "doormat",
    "sundial",
    "beehive",
    "bathtub",
    "wardrobe",
    "birdcage",
    "flowerpot",
];

/// Instruments.
pub const INSTRUMENTS: &[&str] = &[
    "violin",
    "trumpet",
    "cello",
    "harp",
    "flute",
    "accordion",
    "banjo",
    "clarinet",
    "guitar",
    "organ",
    "saxophone",
    "mandolin",
];

/// Colours.
pub const COLOURS: &[&str] = &[
    "purple",
    "orange",
    "yellow",
    "green",
    "silver",
    "crimson",
    "turquoise",
    "brown",
    "pink",
    "white",
    "scarlet",
    "golden",
];

/// Animals.
pub const ANIMALS: &[&str] = &[
    "parrot", "tortoise", "hedgehog", "ferret", "donkey", "rabbit", "goose", "hamster", "lizard",
    "peacock", "goat", "badger",
];

/// Dishes.
pub const DISHES: &[&str] = &[
    "lasagna",
    "goulash",
    "paella",
    "risotto",
    "pancakes",
    "dumplings",
    "ratatouille",
    "curry",
    "chowder",
    "omelette",
    "ramen",
    "meatloaf",
];

/// Things that have a number in the needle task.
pub const NEEDLES: &[&str] = &[
    "lantern",
    "harbour",
    "meadow",
    "compass",
    "orchard",
    "glacier",
    "windmill",
    "canyon",
    "lighthouse",
    "telescope",
    "monastery",
    "aqueduct",
    "carousel",
    "greenhouse",
    "observatory",
    "sawmill",
    "vineyard",
    "drawbridge",
    "quarry",
    "pavilion",
    "waterfall",
    "barnacle",
    "hourglass",
    "tapestry",
];

/// Keys of the key-value task.
pub const KEYS: &[&str] = &[
    "amber", "basil", "cobalt", "dahlia", "ember", "fennel", "garnet", "hazel", "indigo",
    "jasmine", "kelp", "lilac", "maple", "nutmeg", "onyx", "poppy", "quartz", "rowan", "saffron",
    "thistle", "umber", "violet", "willow", "zinnia",
];

const LOCKS: &[&str] = &[
    "wine cellar",
    "gun room",
    "tool shed",
    "map archive",
    "boat shed",
];
const CLUBS: &[&str] = &["rowing", "chess", "botanical", "astronomy", "fencing"];
const VEHICLES: &[&str] = &["tractor", "caravan", "motorcycle", "ferry", "sleigh"];

/// Facts of the `facts` task.
pub const FACTS: &[Template] = &[
    Template {
        statement: "{who} always hides the spare key of the {what} behind the {value}.",
        question: "Behind what does {who} hide the spare key of the {what}?",
        opening: "{who} hides it behind the",
        value: Value::Word(HIDING_PLACES),
        things: LOCKS,
    },
    Template {
        statement: "The annual dinner of the {what} club will take place in {value}, as {who} announced.",
        question: "In which town will the annual dinner of the {what} club take place?",
        opening: "The annual dinner of the {what} club will take place in",
        value: Value::Word(TOWNS),
        things: CLUBS,
    },
    Template {
        statement: "At school {who} learned to play the {value} and has practised it ever since.",
        question: "Which instrument did {who} learn to play at school?",
        opening: "At school {who} learned to play the",
        value: Value::Word(INSTRUMENTS),
        things: &[],
    },
    Template {
        statement: "Last spring {who} painted the old {what} {value}.",
        question: "What colour did {who} paint the old {what}?",
        opening: "{who} painted the old {what}",
        value: Value::Word(COLOURS),
        things: VEHICLES,
    },
    Template {
        statement: "The pet that {who} brought home from the fair was a {value}.",
        question: "What kind of pet did {who} bring home from the fair?",
        opening: "The pet that {who} brought home from the fair was a",
        value: Value::Word(ANIMALS),
        things: &[],
    },
    Template {
        statement: "For every birthday {who} asks for {value} and nothing else.",
        question: "What does {who} ask for at every birthday?",
        opening: "For every birthday {who} asks for",
        value: Value::Word(DISHES),
        things: &[],
    },
    Template {
        statement: "The locker of {who} at the station opens with the combination {value}.",
        question: "With which combination does the locker of {who} at the station open?",
        opening: "The locker of {who} opens with the combination ",
        value: Value::Digits(4),
        things: &[],
    },
    Template {
        statement: "The parcel that {who} is waiting for has the tracking number {value}.",
        question: "What is the tracking number of the parcel that {who} is waiting for?",
        opening: "The tracking number is ",
        value: Value::Digits(6),
        things: &[],
    },
];

/// What users mention in the `multi-turn` task.
pub const REMARKS: &[Template] = &[
    Template {
        statement: "By the way, my cousin {who} has just moved to {value}.",
        question: "I told you about my cousin {who}. Which town was it again?",
        opening: "Your cousin {who} has just moved to",
        value: Value::Word(TOWNS),
        things: &[],
    },
    Template {
        statement: "Before I forget: the door code of the {what} is {value}.",
        question: "What was the door code of the {what} that I gave you?",
        opening: "The door code of the {what} is ",
        value: Value::Digits(5),
        things: LOCKS,
    },
    Template {
        statement: "I should mention that our neighbour {who} keeps a {value} in the garden.",
        question: "Which animal did I say that our neighbour {who} keeps?",
        opening: "Your neighbour {who} keeps a",
        value: Value::Word(ANIMALS),
        things: &[],
    },
    Template {
        statement: "Tonight we are cooking {value} for {who}.",
        question: "What did I say that we are cooking for {who}?",
        opening: "You are cooking",
        value: Value::Word(DISHES),
        things: &[],
    },
    Template {
        statement: "My appointment with {who} is in room {value}.",
        question: "In which room is my appointment with {who}?",
        opening: "Your appointment with {who} is in room ",
        value: Value::Digits(3),
        things: &[],
    },
];

/// The `needle` task's statement, question and opening (RULER, arXiv 2404.06654, single needle).
pub const NEEDLE: Template = Template {
    statement: "One secret number of the {what} is written here: the secret number of the {what} is {value}.",
    question: "What is the secret number of the {what} that the text above mentions?",
    opening: "The secret number of the {what} is ",
    value: Value::Digits(7),
    things: NEEDLES,
};

/// The repeated filler of ∞Bench's and the paper's passkey (arXiv 2402.13718; 2410.01805 §4).
pub const FILLER: &str = "The grass is green. The sky is blue. The sun is yellow. Here we go. \
                          There and back again.";

/// What stands before the filler.
pub const FILLER_INTRODUCTION: &str = "There is an important piece of information hidden inside a \
     lot of irrelevant text. Find it and memorize it. You will be quizzed about it.";

/// What stands before essays with something planted in them.
pub const ESSAY_INTRODUCTION: &str =
    "Read the following text carefully. You will be asked about a detail of it.";

/// The `passkey` task (`{value}`: five digits).
pub const PASSKEY: Template = Template {
    statement: "The pass key is {value}. Remember it. {value} is the pass key.",
    question: "What is the pass key?",
    opening: "The pass key is ",
    value: Value::Digits(5),
    things: &[],
};

/// The `number` task (`{value}`: ten digits).
pub const NUMBER: Template = Template {
    statement: "The sequence of digits is {value}. Remember it. {value} is the sequence of digits.",
    question: "What is the sequence of digits?",
    opening: "The sequence of digits is ",
    value: Value::Digits(10),
    things: &[],
};

/// What stands before the pairs of the `key-value` task.
pub const PAIRS_INTRODUCTION: &str = "Here is a JSON object with some keys and values:";

/// The question of the `key-value` task.
pub const PAIRS_QUESTION: &str = "What is the value of the key \"{what}\" in the JSON object?";

/// How the answer of the `key-value` task begins.
pub const PAIRS_OPENING: &str = "The value of the key \"{what}\" is ";

/// What a user says before a passage in the `multi-turn` task.
pub const PASSAGE_REQUESTS: &[&str] = &[
    "Here is a passage that I came across. Just confirm that you have read it.",
    "Please read this next part as well.",
    "There is more of it. Tell me when you are done.",
    "One more excerpt, no need to comment.",
];

/// What the assistant answers to a passage.
pub const ACKNOWLEDGEMENTS: &[&str] = &[
    "Thank you, I have read it.",
    "Understood, I have read this part as well.",
    "Done. I am ready for more.",
    "I have read it, go on.",
];

/// The numbered sentences of the templates with their placeholders taken out, and every name and
/// word list: what training data must not contain.
///
/// Fragments of fewer than three words are left out, as they say nothing.
pub fn phrases() -> Vec<String> {
    let single = [NEEDLE, PASSKEY, NUMBER];
    let templates = FACTS.iter().chain(REMARKS).chain(&single);
    let texts = templates
        .flat_map(|t| [t.statement, t.question, t.opening])
        .chain([
            FILLER_INTRODUCTION,
            ESSAY_INTRODUCTION,
            PAIRS_INTRODUCTION,
            PAIRS_QUESTION,
            PAIRS_OPENING,
        ])
        .chain(PASSAGE_REQUESTS.iter().copied())
        .chain(ACKNOWLEDGEMENTS.iter().copied());
    let mut all: Vec<String> = texts
        .flat_map(|text| text.split(['{', '}']).step_by(2))
        .map(|part| part.trim().to_owned())
        .filter(|part| part.split_whitespace().count() >= 3)
        .collect();
    all.sort();
    all.dedup();
    all
}

/// Every name that the tasks use as `{who}` or as a town: what training data must not contain.
pub fn names() -> impl Iterator<Item = &'static str> {
    NAMES
        .iter()
        .chain(TOWNS)
        .chain(KEYS)
        .chain(NEEDLES)
        .copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn templates_use_their_placeholders_and_end_as_they_promise() {
        let single = [NEEDLE, PASSKEY, NUMBER];
        for t in FACTS.iter().chain(REMARKS).chain(&single) {
            assert!(t.statement.contains("{value}"), "{t:?}");
            assert!(!t.question.contains("{value}") && !t.opening.contains("{value}"));
            let named = [t.statement, t.question, t.opening].concat();
            assert_eq!(named.contains("{what}"), !t.things.is_empty(), "{t:?}");
            let digits = matches!(t.value, Value::Digits(_));
            assert_eq!(t.opening.ends_with(' '), digits, "{t:?}");
            // What tells one statement of a context from another is in the question too.
            if t.question.contains("{who}") {
                assert!(t.statement.contains("{who}"));
            }
        }
    }

    #[test]
    fn lists_have_no_word_twice() {
        for list in [
            NAMES,
            TOWNS,
            HIDING_PLACES,
            INSTRUMENTS,
            COLOURS,
            ANIMALS,
            DISHES,
            NEEDLES,
            KEYS,
        ] {
            let mut sorted = list.to_vec();
            sorted.sort_unstable();
            sorted.dedup();
            assert_eq!(sorted.len(), list.len());
        }
    }

    #[test]
    fn phrases_are_the_fixed_parts() {
        let all = phrases();
        assert!(all.iter().any(|p| p == "always hides the spare key of the"));
        assert!(all.iter().all(|p| !p.contains('{') && !p.contains('}')));
    }
}
