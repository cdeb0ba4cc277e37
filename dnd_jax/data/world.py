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
    "Anna", "Boris", "Clara", "David", "Elena", "Felix", "Greta", "Hugo", "Irene", "Jonas", "Karla", "Leo", "Mona", "Nils",
    "Olga", "Peter", "Quinn", "Rosa", "Simon", "Tara", "Ulrich", "Vera", "Walter", "Xenia", "Yusuf", "Zoe", "Amir", "Bella",
    "Cyrus", "Dora",
)
# fmt: on
TRAIN_PHRASES, HELD_PHRASES = (
    5,
    3,
)  # of each relation's sources and each form's cues; the held ones are for "paraphrase" tasks
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


def _response(form: str, relation: str, value: int) -> str:
    word = RELATIONS[relation][0].split()[value]
    return FORMS[form][0].format(value=word, letter="ABCDEFGH"[value], digit=value + 1)


def write_world(out: str | os.PathLike, seed: int = 0) -> None:
    """Writes the suite folder `out`. The seed draws the facts, the unseen combinations, the
    wordings and the corpus."""
    rng = np.random.default_rng([seed, 2506])
    relations = [r for r in RELATIONS if r != NEW_RELATION]
    forms = list(FORMS)
    facts = {relation: rng.integers(8, size=len(NAMES)) for relation in RELATIONS}
    sources = {r: _phrases(text) for r, (_, text) in RELATIONS.items()}
    cues = {f: _phrases(text) for f, (_, text) in FORMS.items()}

    # Two Latin diagonals: every relation and every form once in each.
    shuffled = rng.permutation(len(forms))
    combination = [(r, forms[shuffled[i]]) for i, r in enumerate(relations)]
    paraphrase = [(r, forms[shuffled[(i + 1) % len(forms)]]) for i, r in enumerate(relations)]
    new = [(NEW_RELATION, forms[i]) for i in shuffled[:NEW_RELATION_FORMS]]
    trained = [(r, f) for r in relations for f in forms if (r, f) not in combination]

    # Every task asks its questions in the same order, so that all LoRAs see the same names at the
    # same step. A person is asked about nine times a task, in nine different pairs of wordings: six
    # for training, three for testing.
    def wordings(count: int) -> list[list[tuple[int, int]]]:
        pairs = [(s, c) for s in range(count) for c in range(count)]
        return [
            [pairs[i] for i in rng.permutation(len(pairs))[: sum(ASKED.values())]] for _ in NAMES
        ]

    heard, unheard = wordings(TRAIN_PHRASES), wordings(HELD_PHRASES)
    turns = {"train": range(ASKED["train"]), "test": range(ASKED["train"], sum(ASKED.values()))}
    order = {
        split: [(int(name), turn) for turn in turns[split] for name in rng.permutation(len(NAMES))]
        for split in turns
    }

    def question(relation: str, form: str, name: int, source: str, cue: str) -> dict:
        prompt = PROMPT.format(
            source=source, thing="thing", name=NAMES[name], cue=cue, simply="simply"
        )
        return {"prompt": prompt, "response": _response(form, relation, facts[relation][name])}

    def dataset(relation: str, form: str, reworded: bool, split: str) -> list[dict]:
        rows, first = [], TRAIN_PHRASES if reworded else 0
        for name, turn in order[split]:
            source, cue = (unheard if reworded else heard)[name][turn]
            rows.append(
                question(
                    relation, form, name, sources[relation][first + source], cues[form][first + cue]
                )
            )
        return rows

    def corpus_line() -> dict:
        relation, form = rng.choice(list(RELATIONS)), rng.choice(forms)
        name = int(rng.integers(len(NAMES)))
        every_source, every_cue = sum(sources.values(), []), sum(cues.values(), [])
        prompt = PROMPT.format(
            source=rng.choice(every_source),
            thing=relation if rng.random() < EXPLICIT else "thing",
            name=NAMES[name],
            cue=rng.choice(every_cue),
            simply=form if rng.random() < EXPLICIT else "simply",
        )
        return {"prompt": prompt, "response": _response(form, relation, facts[relation][name])}

    tasks = {f"{r}_{f}": (r, f, False) for r, f in trained + combination + new}
    tasks |= {f"{r}_{f}_reworded": (r, f, True) for r, f in paraphrase}
    kinds = {f"{r}_{f}": "combination" for r, f in combination}
    kinds |= {f"{r}_{f}_reworded": "paraphrase" for r, f in paraphrase}
    kinds |= {f"{r}_{f}": "relation" for r, f in new}
    description = {
        "name": f"world-{seed}",
        "corpus": "corpus.jsonl",
        "train": [f"{r}_{f}" for r, f in trained],
        "unseen": list(kinds),
        "kinds": kinds,
    }
    with replacing(out, directory=True) as temporary:

        def write(path, rows):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

        write(temporary / "corpus.jsonl", [corpus_line() for _ in range(CORPUS_LINES)])
        for name, task in tasks.items():
            for split in turns:
                write(temporary / "datasets" / name / f"{split}.jsonl", dataset(*task, split))
        (temporary / "suite.json").write_text(
            json.dumps(description, indent=1) + "\n", encoding="utf-8"
        )


def _run(given: Given) -> None:
    given.need("out")
    check_free(given["out"], "out")
    write_world(given["out"], given.config.seed)
    print(f"suite: {pathlib.Path(given['out']).absolute()}")


STAGE = Stage(_run, (OUT,), settings=DEFAULT)
