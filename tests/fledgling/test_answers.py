"""Gold answers, worked out again from the question's words alone (text) or from the scene (pictures)."""

import itertools
import re

import pytest

from alula_fledgling.microworld import TEXT_FAMILIES, VISUAL_FAMILIES, text_items, visual_items
from alula_fledgling.microworld.scenes import COLOURS, POSITIONS, SHAPES
from alula_fledgling.microworld.skills.facts import LANDS, PROPERTIES

NUMBERS = re.compile(r"\d+")


def words(message):
    return " ".join(part["text"] for part in message["content"] if part["type"] == "text")


def arithmetic(q):
    a, b = map(int, NUMBERS.findall(q))
    return str(a - b if "-" in q or "minus" in q else a + b)


def comparison(q):
    a, b = map(int, NUMBERS.findall(q))
    if q.startswith("Is"):
        return "yes" if (a > b if "larger" in q else a < b) else "no"
    return str(max(a, b) if "larger" in q else min(a, b))


def sorting(q):
    values = sorted(map(int, NUMBERS.findall(q)))
    falling = "large to small" in q or "falling" in q or "downwards" in q
    return " ".join(map(str, values[::-1] if falling else values))


def reversal(q):
    return " ".join(reversed(q.split(": ")[1].split()))


def pattern(q):
    terms = re.split(r"[?:] ", q)[1].split()
    if terms[0].isdigit():
        steps = {int(b) - int(a) for a, b in itertools.pairwise(terms)}
        assert len(steps) == 1
        return str(int(terms[-1]) + steps.pop())
    # the shortest period that explains all terms
    for period in range(1, len(terms)):
        if all(terms[i] == terms[i - period] for i in range(period, len(terms))):
            return terms[len(terms) - period]
    raise AssertionError(q)


def facts(q):
    for land in LANDS:
        if re.search(rf"\b{land}\b", q):
            name = next(name for name in PROPERTIES if name in q or (name == "capital" and "city" in q))
            return PROPERTIES[name][LANDS.index(land)]
    city = next(city for city in PROPERTIES["capital"] if city in q)
    return LANDS[PROPERTIES["capital"].index(city)]


def two_hop(q):
    said, question = re.match(r"(.*\.) (\S[^.?]*[.?])$", q).groups()
    lives = dict(re.findall(r"(\w+) (?:lives in|is from|moved to) (\w+)\.", said))
    person = next(name for name in lives if re.search(rf"\b{name}\b", question))
    name = next(name for name in PROPERTIES if name in question)
    return PROPERTIES[name][LANDS.index(lives[person])]


def deduction(q):
    question = re.split(r"\. ", q)[-1]
    if "Every " in q:
        rules = dict(re.findall(r"Every (\w+) is (\w+)\.", q))
        members = dict(re.findall(r"(\w+) is an? (\w+)\.", q))
        colours = {person: rules[kind] for person, kind in members.items()}
        if question.startswith("Who"):
            return next(person for person, colour in colours.items() if colour in question)
        return next(colour for person, colour in colours.items() if person in question)
    above = set()
    for one, relation, other in re.findall(r"(\w+) is (older|younger|taller|shorter) than (\w+)\.", q):
        above.add((one, other) if relation in ("older", "taller") else (other, one))
    people = {name for pair in above for name in pair}
    above |= {(a, d) for a, b in above for c, d in above if b == c}
    top = any(word in question for word in ("oldest", "tallest", "older", "taller"))
    asked = [person for person in people if person in question] or people
    return max(asked, key=lambda p: sum(pair[0 if top else 1] == p for pair in above))


SOLVERS = {f.__name__: f for f in (arithmetic, comparison, sorting, reversal, pattern, facts, two_hop, deduction)}


@pytest.mark.parametrize("family", SOLVERS)
@pytest.mark.parametrize("split", ["train", "test"])
def test_text_answers(family, split):
    for item in text_items(400, split=split, seed=7, families=[family]):
        question = words(item.messages[-2])
        assert SOLVERS[family](question) == item.targets[-1].answer, question


def test_memory_answers_stand_in_an_earlier_turn_and_nowhere_in_the_last():
    for item in text_items(400, split="train", seed=7, families=["memory"]):
        answer = item.targets[-1].answer
        told = " ".join(words(message) for message in item.messages[:-2] if message["role"] == "user")
        assert re.search(rf"\b{answer}\b", told)
        assert answer not in words(item.messages[-2])
        asked = words(item.messages[-2])
        if "colour" in asked:
            thing = re.search(r"my (\w+)", asked).group(1)
            assert re.search(rf"a {answer} {thing}\b|My {thing} is {answer}\.", told)


SCENE_PARTS = (
    re.compile(rf"(small|large) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})(?: is)? at the ([a-z-]+)(?=,| and a |\.)"),
    re.compile(rf"({'|'.join(sorted(POSITIONS, key=len, reverse=True))}), (small|large) (\w+) (\w+)(?=;|\.)"),
)


def described(text):
    """The things a description names: (size, colour, shape, position)."""
    if text.startswith("Scene: "):
        return [(s, c, f, p) for p, s, c, f in SCENE_PARTS[1].findall(text)]
    return SCENE_PARTS[0].findall(text)


def solve(question, things):
    """Answer a question about (size, colour, shape, position) tuples."""
    place = {p: (n % 3, n // 3) for n, p in enumerate(POSITIONS)}

    def find(name):
        last = name.split()
        return [t for t in things if all(w in (t[1], t[2]) for w in last)]

    named = re.findall(rf"(?:({'|'.join(COLOURS)}) )?\b({'|'.join(SHAPES)})\b", question)
    position = re.search(rf"at the ({'|'.join(sorted(POSITIONS, key=len, reverse=True))})\b", question)
    if re.search(r"^(Describe|Say what|Give a cap|What does the picture|What is in the picture)", question):
        return sorted(f"a {s} {c} {f} at the {p}" for s, c, f, p in things)
    if re.search(r"^(How many|Count)", question):
        colours = [c for c in COLOURS if c in question]
        shapes = [f for f in SHAPES if re.search(rf"\b{f}(es|s)\b", question)]
        return str(sum((not colours or t[1] in colours) and (not shapes or t[2] in shapes) for t in things))
    if re.search(r"further|higher|lower", question):
        (a,), (b,) = (find(" ".join(w for w in n if w)) for n in named)
        (ax, ay), (bx, by) = place[a[3]], place[b[3]]
        gain = {"further left": bx - ax, "further right": ax - bx, "higher": by - ay, "lower": ay - by}
        difference = next(v for k, v in gain.items() if k in question)
        assert difference != 0
        winner = a if difference > 0 else b
        return f"{winner[1]} {winner[2]}"
    if re.search(r"^(Is there|Do you see|Does the picture|Can you find)", question):
        return "yes" if find(" ".join(named[0])) else "no"
    if re.search(r"^(Where|At which place)", question):
        (thing,) = find(" ".join(w for w in named[0] if w))
        return thing[3]
    if "colour" in question:
        (thing,) = [t for t in things if (t[3] == position[1] if position else t[2] == named[0][1])]
        return thing[1]
    colours = [c for c in COLOURS if c in question]
    (thing,) = [t for t in things if (t[3] == position[1] if position else t[1] == colours[0])]
    return thing[2]


def as_parts(family_or_answer, answer):
    if isinstance(family_or_answer, list):
        return sorted(re.split(r", | and ", answer))
    return answer


@pytest.mark.parametrize("split", ["train", "test", "unseen"])
@pytest.mark.parametrize("family", [f for f in VISUAL_FAMILIES if f != "digits"])
def test_visual_answers(family, split):
    for item in visual_items(150, split=split, seed=11, families=[family]):
        scene = item.messages[0]["content"][0]["image"].scene
        things = [(t.size, t.colour, t.shape, t.position) for t in scene.things]
        answer = solve(words(item.messages[0]), things)
        assert answer == as_parts(answer, item.targets[0].answer), words(item.messages[0])


def test_digits_are_read_as_drawn():
    for item in visual_items(100, split="train", seed=0, families=["digits"]):
        assert item.targets[0].answer == item.messages[0]["content"][0]["image"].scene.digits


@pytest.mark.parametrize("split", ["train", "test"])
def test_reading_answers_follow_from_the_description(split):
    checked = 0
    for item in text_items(800, split=split, seed=3, families=["reading"]):
        text = words(item.messages[0])
        if NUMBERS.search(text):
            assert NUMBERS.search(text).group() == item.targets[0].answer.removeprefix("the number ")
            continue
        description, question = re.match(r"(.*\.) (\S[^.?]*[.?])$", text).groups()
        things = described(description)
        assert things, text
        answer = solve(question, things)
        assert answer == as_parts(answer, item.targets[0].answer), text
        checked += 1
    assert checked > 500


def test_every_family_is_checked_here():
    assert set(TEXT_FAMILIES) == {*SOLVERS, "memory", "reading"}
