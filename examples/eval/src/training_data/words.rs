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

const TRADES: &[&str] = &[
    "carpenter",
    "chemist",
    "tailor",
    "surveyor",
    "dentist",
    "plumber",
    "translator",
    "miller",
    "locksmith",
    "optician",
    "bookbinder",
    "nurse",
    "sculptor",
    "brewer",
];

const SPORTS: &[&str] = &[
    "tennis",
    "badminton",
    "hockey",
    "archery",
    "rugby",
    "volleyball",
    "squash",
    "bowling",
    "wrestling",
    "cycling",
    "skiing",
    "golf",
];

const TREES: &[&str] = &[
    "elm",
    "birch",
    "larch",
    "cedar",
    "poplar",
    "cypress",
    "sycamore",
    "alder",
    "linden",
    "spruce",
    "beech",
    "chestnut tree",
];

const LANGUAGES: &[&str] = &[
    "Portuguese",
    "Finnish",
    "Swahili",
    "Latin",
    "Welsh",
    "Turkish",
    "Hungarian",
    "Icelandic",
    "Korean",
    "Basque",
    "Danish",
    "Persian",
];

const CLOTHES: &[&str] = &[
    "raincoat",
    "bow tie",
    "waistcoat",
    "straw hat",
    "scarf",
    "apron",
    "tuxedo",
    "poncho",
    "cardigan",
    "turban",
    "kilt",
    "sandals",
];

const PLACES: &[&str] = &[
    "north gate",
    "warehouse",
    "town hall",
    "east pier",
    "railway bridge",
    "laboratory",
    "printing house",
    "old mill",
    "car park",
    "clinic",
    "hangar",
    "customs office",
];

const PROJECTS: &[&str] = &[
    "Meridian",
    "Bluebird",
    "Cascade",
    "Tempest",
    "Falcon",
    "Horizon",
    "Juniper",
    "Monsoon",
    "Orion",
    "Sandstone",
    "Vanguard",
    "Zephyr",
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
    Fact {
        statement: "The access number for the {what} is {value}.",
        question: "What is the access number for the {what}?",
        opening: "The access number for the {what} is ",
        value: Of::Number(4, 7),
        what: PLACES,
    },
    Fact {
        statement: "The budget of project {what} was fixed at {value} dollars.",
        question: "At how many dollars was the budget of project {what} fixed?",
        opening: "The budget of project {what} is ",
        value: Of::Number(4, 7),
        what: PROJECTS,
    },
    Fact {
        statement: "Project {what} has the internal code {value}.",
        question: "Which internal code does project {what} have?",
        opening: "Project {what} has the internal code",
        value: Of::Code,
        what: PROJECTS,
    },
    Fact {
        statement: "The director of project {what} is {value}.",
        question: "Who is the director of project {what}?",
        opening: "The director of project {what} is",
        value: Of::Person,
        what: PROJECTS,
    },
    Fact {
        statement: "{who} earned a living as a {value} before the war.",
        question: "What did {who} do for a living before the war?",
        opening: "{who} worked as a",
        value: Of::List(TRADES),
        what: &[],
    },
    Fact {
        statement: "{who} plays {value} on Sunday mornings.",
        question: "Which sport does {who} play on Sunday mornings?",
        opening: "On Sunday mornings {who} plays",
        value: Of::List(SPORTS),
        what: &[],
    },
    Fact {
        statement: "In front of the {what} stands a single {value}.",
        question: "Which tree stands in front of the {what}?",
        opening: "In front of the {what} stands a",
        value: Of::List(TREES),
        what: PLACES,
    },
    Fact {
        statement: "To everyone's surprise {who} speaks fluent {value}.",
        question: "Which language does {who} speak fluently?",
        opening: "{who} speaks fluent",
        value: Of::List(LANGUAGES),
        what: &[],
    },
    Fact {
        statement: "{who} never goes out without a {value}.",
        question: "Without what does {who} never go out?",
        opening: "{who} never goes out without a",
        value: Of::List(CLOTHES),
        what: &[],
    },
    Fact {
        statement: "The distance to the {what} is {value} metres.",
        question: "How many metres is it to the {what}?",
        opening: "The distance to the {what} is ",
        value: Of::Number(3, 5),
        what: PLACES,
    },
    Fact {
        statement: "The {what} was built by {value}.",
        question: "Who built the {what}?",
        opening: "The {what} was built by",
        value: Of::Person,
        what: PLACES,
    },
    Fact {
        statement: "The combination for the safe in the {what} is {value}.",
        question: "What is the combination for the safe in the {what}?",
        opening: "The combination is ",
        value: Of::Number(4, 8),
        what: PLACES,
    },
    Fact {
        statement: "The favourite drink of {who} is {value}.",
        question: "What is the favourite drink of {who}?",
        opening: "The favourite drink of {who} is",
        value: Of::List(DRINKS),
        what: &[],
    },
    Fact {
        statement: "The best friend of {who} is {value}.",
        question: "Who is the best friend of {who}?",
        opening: "The best friend of {who} is",
        value: Of::Person,
        what: &[],
    },
    Fact {
        statement: "{who} lives on the corner of {value} Street.",
        question: "On which street does {who} live?",
        opening: "{who} lives on the corner of",
        value: Of::Invented,
        what: &[],
    },
    Fact {
        statement: "The meeting with {who} begins at {value}.",
        question: "When does the meeting with {who} begin?",
        opening: "The meeting with {who} begins at ",
        value: Of::Time,
        what: &[],
    },
    Fact {
        statement: "The deadline for the {what} is {value}.",
        question: "What is the deadline for the {what}?",
        opening: "The deadline for the {what} is",
        value: Of::Date,
        what: PAPERS,
    },
    Fact {
        statement: "{who} owns a {what} made entirely of {value}.",
        question: "What is the {what} that {who} owns made of?",
        opening: "It is made entirely of",
        value: Of::List(METALS),
        what: CLOTHES,
    },
    Fact {
        statement: "The population of {what} was then {value}.",
        question: "What was the population of {what} then?",
        opening: "The population of {what} was ",
        value: Of::Number(4, 6),
        what: CITIES,
    },
    Fact {
        statement: "The winner of the prize in {what} was {value}.",
        question: "Who won the prize in {what}?",
        opening: "The prize in {what} was won by",
        value: Of::Person,
        what: CITIES,
    },
    Fact {
        statement: "The ship in the harbour of {what} is called the {value}.",
        question: "What is the ship in the harbour of {what} called?",
        opening: "The ship is called the",
        value: Of::Invented,
        what: CITIES,
    },
    Fact {
        statement: "The best thing to buy in {what} is {value}.",
        question: "What is the best thing to buy in {what}?",
        opening: "The best thing to buy in {what} is",
        value: Of::List(FRUITS),
        what: CITIES,
    },
    Fact {
        statement: "{who}'s membership number is {value}.",
        question: "What is {who}'s membership number?",
        opening: "{who}'s membership number is ",
        value: Of::Number(4, 9),
        what: &[],
    },
    Fact {
        statement: "Note that the ticket for {what} costs {value} marks.",
        question: "How many marks does the ticket for {what} cost?",
        opening: "The ticket for {what} costs ",
        value: Of::Number(2, 4),
        what: CITIES,
    },
    Fact {
        statement: "The train from {what} arrives at {value}.",
        question: "When does the train from {what} arrive?",
        opening: "The train from {what} arrives at ",
        value: Of::Time,
        what: CITIES,
    },
    Fact {
        statement: "{who} was seen in the {value} on the night in question.",
        question: "Where was {who} seen on the night in question?",
        opening: "{who} was seen in the",
        value: Of::List(ROOMS),
        what: &[],
    },
    Fact {
        statement: "The {value} is the bird on the banner of the {what}.",
        question: "Which bird is on the banner of the {what}?",
        opening: "The bird on the banner of the {what} is the",
        value: Of::List(BIRDS),
        what: GROUPS,
    },
    Fact {
        statement: "{who} wrote a book about {value}.",
        question: "What did {who} write a book about?",
        opening: "{who} wrote a book about",
        value: Of::List(SUBJECTS),
        what: &[],
    },
    Fact {
        statement: "The invoice number of the {what} is {value}.",
        question: "What is the invoice number of the {what}?",
        opening: "The invoice number of the {what} is ",
        value: Of::Number(5, 8),
        what: MACHINES,
    },
    Fact {
        statement: "One code for the {what} was noted: the code for the {what} is {value}.",
        question: "What is the code for the {what}?",
        opening: "The code for the {what} is ",
        value: Of::Number(5, 8),
        what: MACHINES,
    },
    Fact {
        statement: "The {what} has exactly {value} members.",
        question: "How many members does the {what} have?",
        opening: "The number of members is ",
        value: Of::Number(2, 4),
        what: GROUPS,
    },
    Fact {
        statement: "The password for the {what} is {value}. Remember it, because {value} is the only password for the {what}.",
        question: "What is the password for the {what}?",
        opening: "The password for the {what} is",
        value: Of::Invented,
        what: PLACES,
    },
    Fact {
        statement: "{who} keeps {value} coins in a jar.",
        question: "How many coins does {who} keep in a jar?",
        opening: "The number of coins in the jar is ",
        value: Of::Number(3, 5),
        what: &[],
    },
    Fact {
        statement: "The middle name of {who} is {value}.",
        question: "What is the middle name of {who}?",
        opening: "The middle name of {who} is",
        value: Of::Invented,
        what: &[],
    },
    Fact {
        statement: "{who} is afraid of the {value}.",
        question: "Which bird is {who} afraid of?",
        opening: "{who} is afraid of the",
        value: Of::List(BIRDS),
        what: &[],
    },
    Fact {
        statement: "The opposite of the {what} in the plan is marked {value}.",
        question: "What is marked opposite the {what} in the plan?",
        opening: "Opposite the {what} is marked",
        value: Of::Code,
        what: PLACES,
    },
    Fact {
        statement: "{who} has a brother who is a {value}.",
        question: "What is the trade of {who}'s brother?",
        opening: "The brother of {who} is a",
        value: Of::List(TRADES),
        what: &[],
    },
    Fact {
        statement: "At the end of the tour {who} bought a {value}.",
        question: "What did {who} buy at the end of the tour?",
        opening: "At the end of the tour {who} bought a",
        value: Of::List(CLOTHES),
        what: &[],
    },
    Fact {
        statement: "The licence plate of {who} is {value}.",
        question: "What is the licence plate of {who}?",
        opening: "The licence plate of {who} is",
        value: Of::Code,
        what: &[],
    },
    Fact {
        statement: "The {what} weighs {value} kilograms.",
        question: "How many kilograms does the {what} weigh?",
        opening: "The weight of the {what} is ",
        value: Of::Number(2, 5),
        what: MACHINES,
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
    Fact {
        statement: "I almost forgot to say that {who}'s phone number is {value}.",
        question: "What is {who}'s phone number?",
        opening: "{who}'s phone number is ",
        value: Of::Number(6, 9),
        what: &[],
    },
    Fact {
        statement: "My hotel in {what} is the {value}.",
        question: "What is my hotel in {what} called?",
        opening: "Your hotel in {what} is the",
        value: Of::Invented,
        what: CITIES,
    },
    Fact {
        statement: "You should know that {who} is allergic to {value}.",
        question: "What is {who} allergic to?",
        opening: "{who} is allergic to",
        value: Of::List(FRUITS),
        what: &[],
    },
    Fact {
        statement: "We parked in front of the {value}.",
        question: "Where did we park?",
        opening: "You parked in front of the",
        value: Of::List(PLACES),
        what: &[],
    },
    Fact {
        statement: "The wifi password at the {what} is {value}.",
        question: "Which wifi password did I tell you for the {what}?",
        opening: "The wifi password at the {what} is",
        value: Of::Code,
        what: PLACES,
    },
    Fact {
        statement: "My son {who} wants to become a {value}.",
        question: "What does my son {who} want to become?",
        opening: "Your son {who} wants to become a",
        value: Of::List(TRADES),
        what: &[],
    },
    Fact {
        statement: "I have signed up for {value} lessons, by the way.",
        question: "What lessons have I signed up for?",
        opening: "You have signed up for",
        value: Of::List(SPORTS),
        what: &[],
    },
    Fact {
        statement: "My boss {who} gave me until {value}.",
        question: "Until when did my boss {who} give me time?",
        opening: "{who} gave you until",
        value: Of::Date,
        what: &[],
    },
    Fact {
        statement: "The seat that I booked to {what} is number {value}.",
        question: "What is the number of the seat that I booked to {what}?",
        opening: "Your seat to {what} is number ",
        value: Of::Number(2, 3),
        what: CITIES,
    },
    Fact {
        statement: "I am learning {value} with {who}.",
        question: "Which language am I learning with {who}?",
        opening: "You are learning",
        value: Of::List(LANGUAGES),
        what: &[],
    },
    Fact {
        statement: "The repair of my {what} cost {value} euros.",
        question: "How many euros did the repair of my {what} cost?",
        opening: "The repair of your {what} cost ",
        value: Of::Number(2, 4),
        what: MACHINES,
    },
    Fact {
        statement: "My favourite tree is the {value}.",
        question: "What is my favourite tree?",
        opening: "Your favourite tree is the",
        value: Of::List(TREES),
        what: &[],
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
    "Rain falls on the fields. The road winds on. Lights glow in the valley. We walk along. Then \
     we rest a while.",
    "This line has no meaning. Neither does this one. Read on and on. There is nothing to see. \
     Carry on.",
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
    Fact {
        statement: "The secret access code is {value}. Do not lose it: {value} is the secret access code.",
        question: "What is the secret access code?",
        opening: "The secret access code is ",
        value: Of::Number(4, 7),
        what: &[],
    },
    Fact {
        statement: "The hidden key is {value}. Memorise it. {value} is the hidden key.",
        question: "What is the hidden key?",
        opening: "The hidden key is ",
        value: Of::Number(5, 6),
        what: &[],
    },
    Fact {
        statement: "The number to remember is {value}. Again, the number to remember is {value}.",
        question: "Which number had to be remembered?",
        opening: "The number to remember is ",
        value: Of::Number(5, 10),
        what: &[],
    },
    Fact {
        statement: "The name of the winner is {value}.",
        question: "What is the name of the winner?",
        opening: "The name of the winner is",
        value: Of::Person,
        what: &[],
    },
    Fact {
        statement: "The treasure lies in {value}.",
        question: "Where does the treasure lie?",
        opening: "The treasure lies in",
        value: Of::List(CITIES),
        what: &[],
    },
    Fact {
        statement: "The long code is {value}. Keep it safe: {value} is the long code.",
        question: "What is the long code?",
        opening: "The long code is ",
        value: Of::Number(9, 11),
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
    "Some information that will be needed later is somewhere in here. Try to keep it in mind.",
    "I am going to give you a long text with a few questions at the end.",
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
pub(super) fn lists() -> [&'static [&'static str]; 21] {
    [
        TRADES, SPORTS, TREES, LANGUAGES, CLOTHES, PLACES, PROJECTS, FIRST, FAMILY, ROLES, CITIES,
        ROOMS, METALS, SUBJECTS, BIRDS, DRINKS, FRUITS, MACHINES, PAPERS, GROUPS, TABLE_KEYS,
    ]
}
