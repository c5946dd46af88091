//! The names, values and templates of the built-in training data.
//!
//! None of them occurs in the evaluation tasks ([`crate::tasks::words`]): a test compares both.

/// A statement that is strewn into a text, and the question about it.
///
/// `{who}` is a person, `{what}` a thing, `{value}` the answer. `opening` is how the answer begins.
#[derive(Debug, Clone, Copy)]
pub(super) struct Fact {
    pub(super) statement: &'static str,
    pub(super) question: &'static str,
    pub(super) opening: &'static str,
    pub(super) value: Of,
    pub(super) what: &'static [&'static str],
}

/// What a value is drawn from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Of {
    /// A list.
    List(&'static [&'static str]),
    /// A number of so many digits, at least and at most.
    Number(usize, usize),
    /// Letters and digits, such as `KV-3307`.
    Code,
    /// A word that does not exist.
    Invented,
    /// A name and a family name.
    Person,
    /// A time of day.
    Time,
    /// A day of a month.
    Date,
}

pub(super) const FIRST: &[&str] = &[
    "Aurelio",
    "Bridget",
    "Casimir",
    "Delphine",
    "Elliot",
    "Fatima",
    "Gustav",
    "Harriet",
    "Ignacio",
    "Joanna",
    "Kenji",
    "Lucinda",
    "Marek",
    "Nadia",
    "Oswald",
    "Priscilla",
    "Ramona",
    "Sigrid",
    "Tobias",
    "Ursula",
    "Viktor",
    "Wilhelmina",
    "Xavier",
    "Yusuf",
    "Zelda",
    "Anders",
    "Brunhilde",
    "Claudio",
    "Dagmar",
    "Emeka",
    "Francesca",
    "Giles",
    "Hildegard",
    "Ivan",
    "Jocelyn",
    "Konrad",
];

pub(super) const FAMILY: &[&str] = &[
    "Abernathy",
    "Brandvold",
    "Castellano",
    "Drummond",
    "Eriksen",
    "Fairweather",
    "Gallagher",
    "Hollis",
    "Ishikawa",
    "Jorgensen",
    "Kowalczyk",
    "Lindqvist",
    "Mbeki",
    "Novotny",
    "Okafor",
    "Pemberton",
    "Quarles",
    "Rasmussen",
    "Sutherland",
    "Thackeray",
    "Underhill",
    "Vasquez",
    "Whitlock",
    "Yamamoto",
    "Zielinski",
];

/// People without a name.
pub(super) const ROLES: &[&str] = &[
    "the head gardener",
    "the night porter",
    "our accountant",
    "the new apprentice",
    "the canal pilot",
    "the choir master",
    "the senior engineer",
    "my landlord",
    "the village doctor",
    "the ferry captain",
    "the librarian",
    "the treasurer",
];

const CITIES: &[&str] = &[
    "Trondheim",
    "Bologna",
    "Vilnius",
    "Porto",
    "Lyon",
    "Gdansk",
    "Adelaide",
    "Cusco",
    "Nagoya",
    "Tunis",
    "Ghent",
    "Uppsala",
    "Bristol",
    "Mombasa",
    "Graz",
    "Odessa",
    "Valencia",
    "Halifax",
];

const ROOMS: &[&str] = &[
    "attic",
    "pantry",
    "greenroom",
    "chapel",
    "laundry",
    "stable",
    "workshop",
    "bell tower",
    "conservatory",
    "boiler room",
];

const METALS: &[&str] = &[
    "copper",
    "bronze",
    "pewter",
    "marble",
    "oak",
    "ivory",
    "brass",
    "leather",
    "porcelain",
    "slate",
    "walnut",
    "granite",
];

const SUBJECTS: &[&str] = &[
    "botany",
    "astronomy",
    "metallurgy",
    "falconry",
    "cartography",
    "beekeeping",
    "calligraphy",
    "geology",
    "navigation",
    "acoustics",
    "weaving",
    "glassblowing",
];

const BIRDS: &[&str] = &[
    "heron",
    "kestrel",
    "magpie",
    "pelican",
    "ostrich",
    "nightingale",
    "cormorant",
    "falcon",
    "woodpecker",
    "flamingo",
    "owl",
    "sparrow",
];

const DRINKS: &[&str] = &[
    "cider",
    "buttermilk",
    "espresso",
    "ginger beer",
    "green tea",
    "lemonade",
    "cocoa",
    "mineral water",
    "port wine",
    "sherry",
];

const FRUITS: &[&str] = &[
    "apricots",
    "plums",
    "quinces",
    "figs",
    "cherries",
    "gooseberries",
    "melons",
    "pears",
    "tangerines",
    "walnuts",
    "olives",
    "chestnuts",
];

const MACHINES: &[&str] = &[
    "printing press",
    "generator",
    "loom",
    "centrifuge",
    "elevator",
    "crane",
    "turbine",
    "water pump",
    "projector",
    "furnace",
    "refrigerator",
    "tide gauge",
];

const PAPERS: &[&str] = &[
    "lease",
    "warranty",
    "blueprint",
    "patent",
    "inventory",
    "contract",
    "manuscript",
    "petition",
    "passport",
    "invoice",
    "licence",
    "will",
];

const GROUPS: &[&str] = &[
    "orchestra",
    "council",
    "committee",
    "expedition",
    "crew",
    "guild",
    "editorial board",
    "cricket team",
    "parish",
    "cooperative",
];

pub(super) const FACTS: &[Fact] = &[
    Fact {
        statement: "{who} was born in {value} but never spoke about it.",
        question: "Where was {who} born?",
        opening: "{who} was born in",
        value: Of::List(CITIES),
        what: &[],
    },
    Fact {
        statement: "The serial number on the {what} reads {value}.",
        question: "Which serial number does the {what} have?",
        opening: "The serial number on the {what} reads ",
        value: Of::Number(4, 8),
        what: MACHINES,
    },
    Fact {
        statement: "According to the register, the {what} was signed by {value}.",
        question: "Who signed the {what}?",
        opening: "The {what} was signed by",
        value: Of::Person,
        what: PAPERS,
    },
    Fact {
        statement: "In those years {who} drank nothing but {value}.",
        question: "What did {who} drink?",
        opening: "{who} drank nothing but",
        value: Of::List(DRINKS),
        what: &[],
    },
    Fact {
        statement: "The {what} was founded in the year {value}.",
        question: "When was the {what} founded?",
        opening: "It was founded in the year ",
        value: Of::Number(4, 4),
        what: GROUPS,
    },
    Fact {
        statement: "The first thing that {who} studied was {value}.",
        question: "What did {who} study first?",
        opening: "{who} first studied",
        value: Of::List(SUBJECTS),
        what: &[],
    },
    Fact {
        statement: "Nobody but {who} knew that the watchword was \"{value}\".",
        question: "What was the watchword that {who} knew?",
        opening: "The watchword was \"",
        value: Of::Invented,
        what: &[],
    },
    Fact {
        statement: "The {what} stops every day at {value}, and nobody has found out why.",
        question: "At what time does the {what} stop?",
        opening: "The {what} stops every day at ",
        value: Of::Time,
        what: MACHINES,
    },
    Fact {
        statement: "{who} left the {what} in the {value}.",
        question: "Where did {who} leave the {what}?",
        opening: "{who} left it in the",
        value: Of::List(ROOMS),
        what: PAPERS,
    },
    Fact {
        statement: "For the {what}, {who} paid exactly {value} crowns.",
        question: "How many crowns did {who} pay for the {what}?",
        opening: "The price of the {what} was ",
        value: Of::Number(3, 6),
        what: MACHINES,
    },
    Fact {
        statement: "The telephone extension of {who} is {value}.",
        question: "Which telephone extension has {who}?",
        opening: "The extension is ",
        value: Of::Number(3, 5),
        what: &[],
    },
    Fact {
        statement: "It is said that the handle of the {what} is made of {value}.",
        question: "What is the handle of the {what} made of?",
        opening: "The handle is made of",
        value: Of::List(METALS),
        what: MACHINES,
    },
    Fact {
        statement: "The {what} is filed under {value}.",
        question: "Under which reference is the {what} filed?",
        opening: "The {what} is filed under",
        value: Of::Code,
        what: PAPERS,
    },
    Fact {
        statement: "A tame {value} followed {who} wherever the road went.",
        question: "Which bird followed {who}?",
        opening: "{who} was followed by a tame",
        value: Of::List(BIRDS),
        what: &[],
    },
    Fact {
        statement: "The {what} will meet next on {value}.",
        question: "On what day will the {what} meet next?",
        opening: "The next meeting of the {what} is on",
        value: Of::Date,
        what: GROUPS,
    },
    Fact {
        statement: "Since the winter the {what} has been led by {value}.",
        question: "Who leads the {what}?",
        opening: "The {what} is led by",
        value: Of::Person,
        what: GROUPS,
    },
    Fact {
        statement: "{who} grows {value} on the southern slope.",
        question: "What does {who} grow on the southern slope?",
        opening: "On the southern slope {who} grows",
        value: Of::List(FRUITS),
        what: &[],
    },
    Fact {
        statement: "They named the {what} {value}, which pleased everyone.",
        question: "What name did they give to the {what}?",
        opening: "They named the {what}",
        value: Of::Invented,
        what: MACHINES,
    },
    Fact {
        statement: "The account that {who} opened has the number {value}.",
        question: "What number does the account of {who} have?",
        opening: "The account has the number ",
        value: Of::Number(6, 10),
        what: &[],
    },
    Fact {
        statement: "{who} travelled by way of {value} to save time.",
        question: "By way of which city did {who} travel?",
        opening: "{who} travelled by way of",
        value: Of::List(CITIES),
        what: &[],
    },
];

/// What a user of a chat mentions.
pub(super) const MENTIONS: &[Fact] = &[
    Fact {
        statement: "My sister {who} works in {value} now.",
        question: "Where does my sister {who} work?",
        opening: "She works in",
        value: Of::List(CITIES),
        what: &[],
    },
    Fact {
        statement: "Please note that my order for the {what} is number {value}.",
        question: "Under which number did I order the {what}?",
        opening: "You ordered it under number ",
        value: Of::Number(4, 7),
        what: MACHINES,
    },
    Fact {
        statement: "I am meeting {who} at {value} today.",
        question: "At what time am I meeting {who}?",
        opening: "You are meeting at ",
        value: Of::Time,
        what: &[],
    },
    Fact {
        statement: "My username there is {value}, in case you need it.",
        question: "Which username did I give you?",
        opening: "Your username is",
        value: Of::Invented,
        what: &[],
    },
    Fact {
        statement: "My {what} expires on {value}.",
        question: "When does my {what} expire?",
        opening: "It expires on",
        value: Of::Date,
        what: PAPERS,
    },
    Fact {
        statement: "I only like {value}, so leave out everything else.",
        question: "Which fruit do I like?",
        opening: "You like",
        value: Of::List(FRUITS),
        what: &[],
    },
    Fact {
        statement: "My teacher of {what} is called {value}.",
        question: "What is my teacher of {what} called?",
        opening: "Your teacher is called",
        value: Of::Person,
        what: SUBJECTS,
    },
];

/// Fillers that are repeated, and what is hidden in them.
pub(super) const FILLERS: &[&str] = &[
    "The river runs to the sea. Clouds drift over the hills. Birds return in the evening. \
     Nothing has changed since then.",
    "One step follows another. The clock keeps ticking. Doors open and doors close. So it \
     continues all day.",
    "Snow lies on the roofs. Smoke rises from the chimneys. Children run home. The lamps are lit \
     one by one.",
    "Waves roll in and out again. The boats lie at anchor. Gulls cry above the pier. The tide \
     will turn soon.",
];

pub(super) const HIDDEN: &[Fact] = &[
    Fact {
        statement: "Attention: the vault number is {value}. Keep {value} in mind.",
        question: "Which vault number was given?",
        opening: "The vault number is ",
        value: Of::Number(4, 8),
        what: &[],
    },
    Fact {
        statement: "The magic word is \"{value}\". Do not forget \"{value}\".",
        question: "Which word is the magic word?",
        opening: "The magic word is \"",
        value: Of::Invented,
        what: &[],
    },
    Fact {
        statement: "Important notice: the flight is {value}. Once more, the flight is {value}.",
        question: "Which flight does the notice name?",
        opening: "The flight is",
        value: Of::Code,
        what: &[],
    },
    Fact {
        statement: "A digit string appears only here: {value}.",
        question: "Which digit string appears in the lines above?",
        opening: "The digit string is ",
        value: Of::Number(8, 12),
        what: &[],
    },
];

pub(super) const TABLE_KEYS: &[&str] = &[
    "anchor",
    "bellows",
    "cutlass",
    "dredger",
    "easel",
    "flagon",
    "gimbal",
    "halyard",
    "inkwell",
    "jackdaw",
    "kettle",
    "ladder",
    "mallet",
    "needlecase",
    "oarlock",
    "pulley",
    "rudder",
    "spindle",
    "trowel",
    "urn",
    "vise",
    "winch",
    "yoke",
    "zither",
];

/// What stands before a text.
pub(super) const INTRODUCTIONS: &[&str] = &[
    "Below is a long document. Afterwards there are questions on it.",
    "Study this material; I will ask about it later.",
    "The text that follows may contain details that matter.",
    "",
    "Document:",
];

pub(super) const TABLE_INTRODUCTIONS: &[&str] = &[
    "The following records were found:",
    "Stock list, one item per line:",
];

/// What a user says before a passage in a chat.
pub(super) const HANDOVERS: &[&str] = &[
    "I am sending you part of an article.",
    "And this is how it continues.",
    "Now the next few paragraphs.",
    "Finally, this part.",
];

/// What the assistant says after it.
pub(super) const REPLIES: &[&str] = &[
    "Thanks, noted.",
    "Got it.",
    "All right, I have it. What comes next?",
    "I see.",
];

/// Asks for a sentence of the text by its beginning, `{start}`.
pub(super) const QUOTES: &[&str] = &[
    "Quote the sentence that starts with \"{start}\".",
    "How does the sentence beginning \"{start}\" go on?",
    "Repeat in full: \"{start}...\"",
];

/// Every text of this module that could be compared with another list.
#[cfg(test)]
pub(super) fn templates() -> impl Iterator<Item = &'static str> {
    let facts = FACTS.iter().chain(MENTIONS).chain(HIDDEN);
    facts
        .flat_map(|f| [f.statement, f.question, f.opening])
        .chain(FILLERS.iter().copied())
        .chain(INTRODUCTIONS.iter().copied())
        .chain(TABLE_INTRODUCTIONS.iter().copied())
        .chain(HANDOVERS.iter().copied())
        .chain(REPLIES.iter().copied())
        .chain(QUOTES.iter().copied())
}

/// Every list of words.
#[cfg(test)]
pub(super) fn lists() -> [&'static [&'static str]; 14] {
    [
        FIRST, FAMILY, ROLES, CITIES, ROOMS, METALS, SUBJECTS, BIRDS, DRINKS, FRUITS, MACHINES,
        PAPERS, GROUPS, TABLE_KEYS,
    ]
}
