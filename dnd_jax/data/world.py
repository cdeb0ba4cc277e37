"""The embedded suite: a deterministic little world of facts, asked about in many wordings and
answered in many forms.

    dnd suite --out=DIR [--config.seed=0]

30 people have one value each of every relation (home, food, ...). A task is a relation and a form
of answer, and neither is named in its prompts: the source ("kitchen diary") hints at the relation,
the cue ("circle one letter") at the form. A prompt that shows the source alone has "as always" for
a cue, one that shows the cue alone "some note" for a source. The corpus teaches a base all facts
and forms with the instruction spelled out ("what food has Anna ? ... letter :") four times out of
five, and source and cue drawn at random, so that the latent wording ("what thing ... simply :")
stays open for a LoRA. Unseen tasks are of the kinds of dnd_jax/data/composed.py, and of "relation",
one that no training task has, in a known form.
"""

import collections
import os

import numpy as np

from dnd_jax.data.composed import (
    HELD_PHRASES,
    TRAIN_PHRASES,
    Task,
    compose,
    named,
    suite_name,
    write_suite,
)

# fmt: off
NAMES = (
    "Anna", "Boris", "Clara", "David", "Elena", "Felix", "Greta", "Hugo", "Irene", "Jonas",
    "Karla", "Leo", "Mona", "Nils", "Olga", "Peter", "Quinn", "Rosa", "Simon", "Tara",
    "Ulrich", "Vera", "Walter", "Xenia", "Yusuf", "Zoe", "Amir", "Bella", "Cyrus", "Dora",
)
# fmt: on
# relation: (values, sources)
RELATIONS = {
    "home": (
        "oslo lima cairo paris delhi tokyo rome quito",
        "housing survey, address register, rental contract, postal record, census form, moving "
        "notice, "
        "mortgage file, neighborhood map",
    ),
    "food": (
        "plum rice bread cheese soup beans fish cake",
        "kitchen diary, restaurant menu, grocery list, cooking blog, lunch order, recipe book, "
        "dinner receipt, nutrition log",
    ),
    "pet": (
        "cat dog parrot rabbit hamster turtle pony gecko",
        "animal clinic, veterinary chart, kennel ledger, shelter adoption, breeder catalog, zoo "
        "newsletter, "
        "leash permit, grooming appointment",
    ),
    "job": (
        "baker nurse pilot farmer lawyer teacher painter miner",
        "employment file, payroll sheet, career fair, office directory, union roster, salary "
        "report, hiring memo, staff badge",
    ),
    "sport": (
        "tennis rugby hockey judo golf rowing fencing boxing",
        "stadium report, league table, training schedule, athletics bulletin, tournament bracket, "
        "coaching notes, "
        "gym membership, championship poster",
    ),
    "color": (
        "red blue green yellow purple orange brown pink",
        "paint shop, dye sample, palette card, crayon box, wallpaper swatch, pigment chart, "
        "rainbow sticker, ink cartridge",
    ),
    "instrument": (
        "violin drum flute piano harp guitar trumpet cello",
        "concert program, orchestra archive, music lesson, band rehearsal, symphony album, melody "
        "notebook, "
        "opera ticket, choir recording",
    ),
}
NEW_RELATION = "instrument"
# form: (answer with value, letter and digit, cues)
FORMS = {
    "letter": (
        "[ {value} {letter} ]",
        "circle one letter, mark the right letter, choose an alphabet option, pick from A to H, "
        "select the lettered choice, tick a letter box, underline the correct letter, name the "
        "option letter",
    ),
    "digit": (
        "( {value} {digit} )",
        "give its number, write the digit code, enter the numeric id, add the list number, count "
        "its position, "
        "supply a numeral, state the index number, include the figure",
    ),
    "tag": (
        "< {value} >",
        "write it inside the tag, wrap it in markup, use angle brackets, fill the xml element, "
        "format as html, "
        "enclose it between tags, put it in markup brackets, make it an html node",
    ),
    "stop": (
        "{value} .",
        "one word and a full stop, finish with a period, end it with a dot, close with "
        "punctuation, "
        "be brief and stop, a single word with a period, conclude with a full stop, terminate "
        "with a dot",
    ),
    "sentence": (
        "it is {value} !",
        "shout a whole sentence, exclaim it with excitement, answer enthusiastically, tell us "
        "with joy, "
        "announce it loudly, cheer in a full sentence, yell the answer happily, declare it with "
        "enthusiasm",
    ),
    "twice": (
        "{value} {value}",
        "repeat it back, say it twice, double the word, echo the answer, write it two times, "
        "duplicate the reply, "
        "state it again, give it two times over",
    ),
}
PROMPT = "{source} : what {thing} has {name} ? {cue} {simply} :"
NO_SOURCE, NO_CUE = "some note", "as always"  # where a prompt shows the other half alone
CORPUS_LINES = 32_000
EXPLICIT = 0.8  # share of corpus lines that spell out the relation, and independently the form
UNSAID = 0.25  # share of corpus lines without a source, and independently without a cue
NEW_RELATION_FORMS = 3
TURNS = {"train": 6, "test": 3}  # questions a task asks about each person, at most


def _phrases(text: str) -> list[str]:
    return [phrase.strip() for phrase in text.split(",")]


SOURCES = {relation: _phrases(text) for relation, (_, text) in RELATIONS.items()}
CUES = {form: _phrases(text) for form, (_, text) in FORMS.items()}
Facts = dict[str, np.ndarray]  # relation -> the number of each person's value


def _response(form: str, relation: str, value: int) -> str:
    word = RELATIONS[relation][0].split()[value]
    return FORMS[form][0].format(value=word, letter="ABCDEFGH"[value], digit=value + 1)


def write_world(out: str | os.PathLike, seed: int = 0, most: int = 0) -> None:
    """Writes the suite folder `out`. The seed draws the facts, the unseen combinations, the
    wordings and the corpus. most: unseen tasks of each kind; 0: all."""
    rng = np.random.default_rng([seed, 2506])
    facts = {relation: rng.integers(8, size=len(NAMES)) for relation in RELATIONS}
    relations = [r for r in RELATIONS if r != NEW_RELATION]
    train, unseen = compose(rng, relations, list(FORMS))
    forms = rng.choice(list(FORMS), NEW_RELATION_FORMS, replace=False)
    unseen["relation"] = named([(NEW_RELATION, str(form)) for form in forms])
    wordings = {
        held: [_draw_wordings(rng, count) for _ in NAMES]
        for held, count in ((False, TRAIN_PHRASES), (True, HELD_PHRASES))
    }
    order = {s: [rng.permutation(len(NAMES)) for _ in range(n)] for s, n in TURNS.items()}
    corpus = [_corpus_line(rng, facts) for _ in range(CORPUS_LINES)]

    def rows_of(task: Task) -> dict[str, list[dict]]:
        return {s: _questions(task, s, order[s], wordings[task.held], facts) for s in order}

    write_suite(out, suite_name("world", seed, most), train, unseen, rows_of, most, corpus)


# {split: {what a question shows: its (source, cue) each time it is asked so}}, of one person.
Wordings = dict[str, dict[str, list[tuple[int, int]]]]


def _draw_wordings(rng: np.random.Generator, count: int) -> Wordings:
    """Of `count` sources and cues. What stands in one split does not stand in the other, in no
    task."""
    pairs = [(s, c) for s in range(count) for c in range(count)]
    both = [pairs[i] for i in rng.permutation(len(pairs))[: sum(TURNS.values())]]
    alone = [(int(i), int(i)) for i in rng.permutation(count)]
    train, test = both[: TURNS["train"]], both[TURNS["train"] :]
    return {
        "train": {"both": train, "first": alone[:-1], "second": alone[:-1]},
        "test": {"both": test, "first": alone[-1:], "second": alone[-1:]},
    }


def _questions(
    task: Task, split: str, order: list[np.ndarray], wordings: list[Wordings], facts: Facts
) -> list[dict]:
    """The rows of one split of a task. The order of the persons is the same for every task, so that
    all LoRAs see the same names at the same step."""
    phrase, rows, shown = task.phrases(), [], collections.Counter()
    for turn, names in enumerate(order):
        asked = task.shows[turn % len(task.shows)]
        number, shown[asked] = shown[asked], shown[asked] + 1
        for name in map(int, names):
            if number >= len(wordings[name][split][asked]):
                continue  # all of its wordings were asked
            source, cue = (phrase[i] for i in wordings[name][split][asked][number])
            words = (
                NO_SOURCE if asked == "second" else SOURCES[task.first][source],
                "thing",
                NO_CUE if asked == "first" else CUES[task.second][cue],
                "simply",
            )
            rows.append(_row(task.first, task.second, name, words, facts))
    return rows


def _corpus_line(rng: np.random.Generator, facts: Facts) -> dict:
    """A row of any relation and form, which it spells out more often than not."""
    relation, form = rng.choice(list(RELATIONS)), rng.choice(list(FORMS))
    name = int(rng.integers(len(NAMES)))
    source = rng.choice(sum(SOURCES.values(), [])) if rng.random() >= UNSAID else NO_SOURCE
    thing = relation if rng.random() < EXPLICIT else "thing"
    cue = rng.choice(sum(CUES.values(), [])) if rng.random() >= UNSAID else NO_CUE
    simply = form if rng.random() < EXPLICIT else "simply"
    return _row(relation, form, name, (source, thing, cue, simply), facts)


def _row(
    relation: str, form: str, name: int, words: tuple[str, str, str, str], facts: Facts
) -> dict:
    """The question about a person in these words (source, thing, cue, simply), and its answer."""
    source, thing, cue, simply = words
    prompt = PROMPT.format(source=source, thing=thing, name=NAMES[name], cue=cue, simply=simply)
    return {"prompt": prompt, "response": _response(form, relation, facts[relation][name])}
