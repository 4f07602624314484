"""Words of BIG-Bench Hard's inputs (MIT licence), for the generators."""

from pathlib import Path

# People of web_of_lies.
LIARS = (
    "Alejandro", "Alexis", "Amberly", "Andree", "Antwan", "Audrie", "Bernita", "Christie", "Conception", "Crista",
    "Dallas", "Delbert", "Delfina", "Elanor", "Fidel", "Fletcher", "Gwenn", "Helene", "Inga", "Jamey", "Jaymie",
    "Jerry", "Jim", "Ka", "Kandi", "Kristian", "Leda", "Lorine", "Maybelle", "Michael", "Michaela", "Millicent",
    "Millie", "Osvaldo", "Phoebe", "Rashida", "Raymond", "Ryan", "Sal", "Shalonda", "Shaunda", "Shenna",
    "Sherrie", "Sima", "Tamika", "Teressa", "Vernell", "Vina", "Willian", "Yoland",
)  # fmt: skip

# What object_counting counts: singular and plural, by kind.
THINGS: dict[str, tuple[tuple[str, str], ...]] = {
    "objects": (
        ("bed", "beds"), ("car", "cars"), ("chair", "chairs"), ("couch", "couches"), ("fridge", "fridges"),
        ("lamp", "lamps"), ("microwave", "microwaves"), ("oven", "ovens"), ("stove", "stoves"),
        ("table", "tables"), ("toaster", "toasters"),
    ),
    "vegetables": (
        ("cabbage", "cabbages"), ("carrot", "carrots"), ("cauliflower", "cauliflowers"), ("garlic", "garlics"),
        ("head of broccoli", "heads of broccoli"), ("lettuce head", "lettuce heads"), ("onion", "onions"),
        ("potato", "potatoes"), ("stalk of celery", "stalks of celery"), ("yam", "yams"),
    ),
    "animals": (
        ("bear", "bears"), ("cat", "cats"), ("chicken", "chickens"), ("cow", "cows"), ("dog", "dogs"),
        ("donkey", "donkeys"), ("duck", "ducks"), ("fish", "fish"), ("frog", "frogs"), ("goat", "goats"),
        ("mouse", "mice"), ("pig", "pigs"), ("rabbit", "rabbits"), ("snail", "snails"), ("snake", "snakes"),
    ),
    "musical instruments": (
        ("accordion", "accordions"), ("clarinet", "clarinets"), ("drum", "drums"), ("flute", "flutes"),
        ("piano", "pianos"), ("trombone", "trombones"), ("trumpet", "trumpets"), ("violin", "violins"),
    ),
    "fruits": (
        ("apple", "apples"), ("banana", "bananas"), ("blackberry", "blackberries"), ("grape", "grapes"),
        ("nectarine", "nectarines"), ("orange", "oranges"), ("peach", "peaches"), ("plum", "plums"),
        ("raspberry", "raspberries"), ("strawberry", "strawberries"),
    ),
}  # fmt: skip

# Adjectives of hyperbaton by class, in the order that it takes for correct: opinion, size, age, shape, colour, origin,
# material, purpose.
ADJECTIVES: tuple[tuple[str, ...], ...] = (
    ("awful", "good", "lovely", "mysterious", "nice", "obnoxious", "repulsive", "ridiculous", "silly", "terrible",
     "wonderful"),
    ("big", "enormous", "huge", "large", "little", "massive", "medium-size", "midsize", "normal-size", "small",
     "tiny"),
    ("ancient", "archaic", "brand-new", "new", "old", "old-fashioned"),
    ("circular", "prismlike", "pyramidal", "rectangular", "spherical", "square", "triangular"),
    ("aqua", "black", "blue", "brown", "crimson", "gray", "green", "grey", "indigo", "ivory", "maroon", "orange",
     "pink", "purple", "red", "tan", "teal", "violet", "white", "yellow"),
    ("American", "Bangladeshi", "Brazilian", "Chinese", "Congolese", "Egyptian", "Ethiopian", "Filipino",
     "German", "Indian", "Indonesian", "Iranian", "Japanese", "Mexican", "Nigerian", "Pakistani", "Russian",
     "Thai", "Turkish", "Vietnamese"),
    ("cardboard", "cloth", "fiberglass", "glass", "gold", "iron", "lead", "leather", "paper", "plastic", "rubber",
     "silver", "steel", "wood", "wool"),
    ("drinking", "driving", "eating", "exercise", "hiking", "smoking", "snorkeling", "typing", "walking",
     "whittling"),
)  # fmt: skip
HYPERBATON_NOUNS = (
    "baby", "car", "cat", "chair", "computer", "dog", "knife", "match", "monkey", "motorcycle", "ship", "shoe",
    "sock", "surfboard", "sweater",
)  # fmt: skip

# Things of reasoning_about_colored_objects, singular and plural, and the colours in the order of its options.
COLORED = (
    ("booklet", "booklets"), ("bracelet", "bracelets"), ("cat toy", "cat toys"), ("crayon", "crayons"),
    ("cup", "cups"), ("dog leash", "dog leashes"), ("envelope", "envelopes"),
    ("fidget spinner", "fidget spinners"), ("jug", "jugs"), ("keychain", "keychains"), ("mug", "mugs"),
    ("necklace", "necklaces"), ("notebook", "notebooks"), ("pair of sunglasses", "pairs of sunglasses"),
    ("paperclip", "paperclips"), ("pen", "pens"), ("pencil", "pencils"), ("plate", "plates"),
    ("puzzle", "puzzles"), ("scrunchiephone charger", "scrunchiephone chargers"),
    ("sheet of paper", "sheets of paper"), ("stress ball", "stress balls"), ("teddy bear", "teddy bears"),
    ("textbook", "textbooks"),
)  # fmt: skip
COLORS = (
    "red", "orange", "yellow", "green", "blue", "brown", "magenta", "fuchsia", "mauve", "teal", "turquoise",
    "burgundy", "silver", "gold", "black", "grey", "purple", "pink",
)  # fmt: skip

# People, places and doings of temporal_sequences.
WITNESSES = (
    "Andrew", "Anthony", "Ashley", "Betty", "David", "Elizabeth", "Emily", "Hannah", "James", "Jason", "Jennifer",
    "Jessica", "John", "Kimberly", "Leslie", "Linda", "Lisa", "Mark", "Mary", "Michael", "Nancy", "Richard",
    "Samantha", "Sarah", "Sean", "Steven", "Susan", "Thomas", "Tiffany", "William",
)  # fmt: skip
DESTINATIONS = (
    "amusement park", "art show", "art studio", "bakery", "basketball court", "beach", "bookstore",
    "clothing store", "coffee shop", "construction site", "dance studio", "football field", "gas station",
    "library", "market", "movies", "museum", "orchestra hall", "park", "physics classroom", "restaurant",
    "soccer field", "swimming pool",
)  # fmt: skip
DOINGS = (
    "attending class at the school", "buying a bike at the bike shop", "buying a phone at the electronics store",
    "buying clothes at the mall", "buying cookies at a bakery", "buying lunch at the deli",
    "driving to the water park", "fixing their computer at the electronic store", "getting a coffee at the cafe",
    "playing tennis at the tennis court", "reading at the library", "sitting on a rooftop",
    "stretching at a yoga studio", "taking photos near the Eiffel Tower",
    "taking photos near the Leaning Tower of Pisa", "waiting at the airport", "waiting at the train station",
    "walking in the garden", "walking towards the Statue of Liberty", "watching a movie at the theater",
    "working at the office", "working out at the gym",
)  # fmt: skip

# Words of word_sorting.
SORTED_WORDS = tuple(Path(__file__).with_name("sorted_words.txt").read_text().split())
