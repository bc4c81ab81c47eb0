"""Names and plain words the skills share. Most are whole tokens of the fledgling's tokenizer."""

PEOPLE = (
    "Tom", "Mia", "Sam", "Ana", "Ben", "Eva", "Max", "Ida", "Leo", "Zoe", "Kim", "Jon",
    "Ada", "Ned", "Liv", "Ray",
)  # fmt: skip

WORDS = (
    "apple", "river", "chair", "cloud", "bottle", "garden", "window", "pencil", "tower", "blanket", "forest", "candle",
    "mirror", "button", "ladder", "basket", "hammer", "island", "jacket", "kettle", "lemon", "marble", "needle",
    "ocean", "pillow", "ribbon", "saddle", "ticket", "umbrella", "violin", "wagon", "anchor",
)  # fmt: skip
