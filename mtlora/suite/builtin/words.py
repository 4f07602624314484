"""Word lists of the generators. Words are short and common: an input should spend tokens on structure, not spelling."""

import json
from pathlib import Path

NAMES = (
    "Alice", "Anna", "Ben", "Bob", "Carl", "Claire", "Clara", "Dan", "Dave", "David", "Emma", "Eric", "Eve", "Frank",
    "Fred", "Grace", "Helen", "Henry", "Jack", "James", "Jane", "Joe", "John", "Julia", "Karen", "Kim", "Laura", "Leo",
    "Lisa", "Lucy", "Mark", "Mary", "Max", "Mike", "Nick", "Nina", "Oliver", "Paul", "Peter", "Rose", "Ruth", "Sam",
    "Sara", "Simon", "Sophie", "Steve", "Tom", "Victor", "Wendy", "Zoe",
)  # fmt: skip

# Kinds of things with (singular, plural). No word could belong to two kinds.
KINDS: dict[str, tuple[tuple[str, str], ...]] = {
    kind: tuple(words.items()) for kind, words in json.loads(Path(__file__).with_name("kinds.json").read_text()).items()
}

NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

COLORS = ("black", "blue", "brown", "green", "orange", "pink", "purple", "red", "white", "yellow")

ITEMS = (
    "ball", "bag", "book", "bottle", "box", "brush", "candle", "card", "clock", "coin", "cup", "fan", "fork", "hat",
    "key", "knife", "lamp", "map", "mug", "pen", "pencil", "phone", "plate", "ring", "spoon", "stamp", "toy", "watch",
)  # fmt: skip

# Words for lists, with enough initials for lists of four distinct ones.
WORDS = (
    "air", "apple", "arm", "ball", "bank", "bird", "book", "box", "bread", "cake", "car", "chair", "city", "clock",
    "cloud", "cup", "day", "desk", "dog", "door", "dream", "ear", "earth", "egg", "eye", "face", "farm", "field",
    "fire", "fish", "flag", "game", "garden", "gift", "glass", "gold", "hand", "hat", "heart", "hill", "horse",
    "house", "ice", "idea", "iron", "island", "job", "joke", "judge", "juice", "key", "king", "kitchen", "knife",
    "lake", "lamp", "leaf", "letter", "light", "map", "milk", "moon", "mouse", "music", "name", "nail", "night",
    "nose", "oil", "orange", "oven", "owl", "page", "paper", "pen", "pig", "queen", "question", "rain", "ring",
    "river", "road", "rock", "salt", "school", "sea", "ship", "shoe", "snow", "song", "star", "sun", "table",
    "tail", "tea", "tiger", "town", "tree", "uncle", "valley", "voice", "wall", "water", "wind", "window", "wood",
    "year", "zoo",
)  # fmt: skip

# Nouns for syllogisms, plural. They need not make sense together: validity depends on form alone.
CLASSES = (
    "artists", "bakers", "cats", "cooks", "dancers", "doctors", "dogs", "drivers", "engineers", "farmers", "golfers",
    "hikers", "horses", "judges", "lawyers", "miners", "nurses", "painters", "pilots", "poets", "rabbits", "readers",
    "runners", "sailors", "singers", "students", "swimmers", "teachers", "tigers", "writers",
)  # fmt: skip

# Adjectives by class, in their order before an English noun. Grammars agree on every pair of neighbouring classes;
# words of two classes are left out.
ADJECTIVES: tuple[tuple[str, ...], ...] = (
    ("awful", "beautiful", "lovely", "nice", "silly", "terrible", "ugly", "wonderful"),
    ("big", "enormous", "huge", "large", "little", "massive", "small", "tiny"),
    ("ancient", "brand-new", "new", "old"),
    ("circular", "rectangular", "round", "square", "triangular"),
    ("black", "blue", "brown", "green", "pink", "purple", "red", "white", "yellow"),
    ("American", "Brazilian", "Chinese", "French", "German", "Indian", "Italian", "Japanese", "Mexican", "Turkish"),
    ("cardboard", "copper", "glass", "leather", "plastic", "rubber", "steel", "wooden"),
)
NOUNS = (
    "bag", "ball", "box", "bowl", "chair", "clock", "cup", "hat", "knife", "lamp", "mirror", "plate", "ring", "shoe",
    "spoon", "sweater", "table", "toy", "tray", "watch",
)  # fmt: skip

BIRDS = ("crow", "eagle", "falcon", "goose", "hawk", "heron", "magpie", "owl", "parrot", "pigeon", "raven", "robin")
GOODS = (
    "apples", "bananas", "grapes", "kiwis", "lemons", "mangoes", "melons", "oranges", "peaches", "pears", "plums",
    "cherries",
)  # fmt: skip
CARS = ("bus", "convertible", "limousine", "minivan", "motorcycle", "sedan", "tractor", "truck", "van", "scooter")

PLACES = (
    "airport", "bakery", "bank", "beach", "cinema", "gym", "hospital", "library", "mall", "market", "museum", "office",
    "park", "pool", "school", "station", "theater", "zoo",
)  # fmt: skip

MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)  # fmt: skip
