"""The embedded suite: a deterministic little world of facts, asked about in many wordings and
answered in many forms.

    dnd suite --out=DIR [--config.seed=0]

30 people have one value each of every relation (home, food, ...). A task is a relation and a form
of answer, and neither is named in its prompts: the source ("kitchen diary") hints at the relation,
the cue ("circle one letter") at the form. The corpus teaches a base all facts and forms with the
instruction spelled out ("what food has Anna ? ... letter :") four times out of five, and source and
cue drawn at random, so that the latent wording ("what thing ... simply :") stays open for a LoRA.
Unseen tasks are of three kinds: "combination" (relation and form known, never together),
"paraphrase" (a trained combination, sources and cues never seen), "relation" (a relation that no
training task has, in a known form).
"""

import json
import os
import pathlib

import numpy as np

from dnd_jax.core.files import check_free, replacing
from dnd_jax.core.stage import DEFAULT, OUT, Given, Stage

# fmt: off
NAMES = (
    "Anna", "Boris", "Clara", "David", "Elena", "Felix", "Greta", "Hugo", "Irene", "Jonas",
    "Karla", "Leo", "Mona", "Nils", "Olga", "Peter", "Quinn", "Rosa", "Simon", "Tara",
    "Ulrich", "Vera", "Walter", "Xenia", "Yusuf", "Zoe", "Amir", "Bella", "Cyrus", "Dora",
)
# fmt: on
# Of each relation's sources and each form's cues; the held ones are for "paraphrase" tasks.
TRAIN_PHRASES, HELD_PHRASES = 5, 3
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
CORPUS_LINES = 32_000
EXPLICIT = 0.8  # share of corpus lines that spell out the relation, and independently the form
ASKED = {"train": 6, "test": 3}  # questions a task asks about each person
NEW_RELATION_FORMS = 3


def _phrases(text: str) -> list[str]:
    return [phrase.strip() for phrase in text.split(",")]


SOURCES = {relation: _phrases(text) for relation, (_, text) in RELATIONS.items()}
CUES = {form: _phrases(text) for form, (_, text) in FORMS.items()}
Facts = dict[str, np.ndarray]  # relation -> the number of each person's value


def _response(form: str, relation: str, value: int) -> str:
    word = RELATIONS[relation][0].split()[value]
    return FORMS[form][0].format(value=word, letter="ABCDEFGH"[value], digit=value + 1)


Task = tuple[str, str, bool]  # relation, form, whether its sources and cues are the held ones
Wordings = list[list[tuple[int, int]]]  # [person][turn]: which source, which cue


def write_world(out: str | os.PathLike, seed: int = 0) -> None:
    """Writes the suite folder `out`. The seed draws the facts, the unseen combinations, the
    wordings and the corpus."""
    rng = np.random.default_rng([seed, 2506])
    facts = {relation: rng.integers(8, size=len(NAMES)) for relation in RELATIONS}
    train, unseen = _draw_tasks(rng)
    wordings = {False: _draw_wordings(rng, TRAIN_PHRASES), True: _draw_wordings(rng, HELD_PHRASES)}
    order = _draw_order(rng)
    corpus = [_corpus_line(rng, facts) for _ in range(CORPUS_LINES)]
    kinds = {name: kind for kind, tasks in unseen.items() for name in tasks}
    description = {
        "name": f"world-{seed}",
        "corpus": "corpus.jsonl",
        "train": list(train),
        "unseen": list(kinds),
        "kinds": kinds,
    }
    with replacing(out, directory=True) as temporary:
        _write_rows(temporary / "corpus.jsonl", corpus)
        for tasks in (train, *unseen.values()):
            for name, task in tasks.items():
                for split, asked in order.items():
                    rows = _questions(task, asked, wordings[task[2]], facts)
                    _write_rows(temporary / "datasets" / name / f"{split}.jsonl", rows)
        (temporary / "suite.json").write_text(
            json.dumps(description, indent=1) + "\n", encoding="utf-8"
        )


def _draw_tasks(rng: np.random.Generator) -> tuple[dict[str, Task], dict[str, dict[str, Task]]]:
    """({name: task} to train on, {kind: {name: task}} of the unseen ones)."""
    relations, forms = [r for r in RELATIONS if r != NEW_RELATION], list(FORMS)
    # Two Latin diagonals: every relation and every form once in each.
    shuffled = [forms[i] for i in rng.permutation(len(forms))]
    combination = list(zip(relations, shuffled, strict=True))
    paraphrase = list(zip(relations, shuffled[1:] + shuffled[:1], strict=True))
    new = [(NEW_RELATION, form) for form in shuffled[:NEW_RELATION_FORMS]]
    trained = [(r, f) for r in relations for f in forms if (r, f) not in combination]

    def named(pairs: list[tuple[str, str]]) -> dict[str, Task]:
        return {f"{r}_{f}": (r, f, False) for r, f in pairs}

    return named(trained), {
        "combination": named(combination),
        "paraphrase": {f"{r}_{f}_reworded": (r, f, True) for r, f in paraphrase},
        "relation": named(new),
    }


def _draw_wordings(rng: np.random.Generator, count: int) -> Wordings:
    """Pairs of `count` sources and cues. A person is asked about nine times a task, in nine
    different pairs: six for training, three for testing."""
    pairs = [(s, c) for s in range(count) for c in range(count)]
    return [[pairs[i] for i in rng.permutation(len(pairs))[: sum(ASKED.values())]] for _ in NAMES]


def _draw_order(rng: np.random.Generator) -> dict[str, list[tuple[int, int]]]:
    """{split: (person, turn) of each question}: the same for every task, so that all LoRAs see the
    same names at the same step."""
    turns = {"train": range(ASKED["train"]), "test": range(ASKED["train"], sum(ASKED.values()))}
    return {
        split: [(int(name), turn) for turn in turns[split] for name in rng.permutation(len(NAMES))]
        for split in turns
    }


def _questions(
    task: Task, asked: list[tuple[int, int]], wordings: Wordings, facts: Facts
) -> list[dict]:
    """The rows of one split of a task."""
    relation, form, reworded = task
    first = TRAIN_PHRASES if reworded else 0
    rows = []
    for name, turn in asked:
        source, cue = wordings[name][turn]
        words = SOURCES[relation][first + source], "thing", CUES[form][first + cue], "simply"
        rows.append(_row(relation, form, name, words, facts))
    return rows


def _corpus_line(rng: np.random.Generator, facts: Facts) -> dict:
    """A row of any relation and form, which it spells out more often than not."""
    relation, form = rng.choice(list(RELATIONS)), rng.choice(list(FORMS))
    name = int(rng.integers(len(NAMES)))
    source = rng.choice(sum(SOURCES.values(), []))
    thing = relation if rng.random() < EXPLICIT else "thing"
    cue = rng.choice(sum(CUES.values(), []))
    simply = form if rng.random() < EXPLICIT else "simply"
    return _row(relation, form, name, (source, thing, cue, simply), facts)


def _row(
    relation: str, form: str, name: int, words: tuple[str, str, str, str], facts: Facts
) -> dict:
    """The question about a person in these words (source, thing, cue, simply), and its answer."""
    source, thing, cue, simply = words
    prompt = PROMPT.format(source=source, thing=thing, name=NAMES[name], cue=cue, simply=simply)
    return {"prompt": prompt, "response": _response(form, relation, facts[relation][name])}


def _write_rows(path: pathlib.Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _run(given: Given) -> None:
    given.need("out")
    check_free(given["out"], "out")
    write_world(given["out"], given.config.seed)
    print(f"suite: {pathlib.Path(given['out']).absolute()}")


STAGE = Stage(_run, (OUT,), settings=DEFAULT)
