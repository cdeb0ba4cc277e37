"""A suite of another world than the embedded one, in the same format: towns instead of people,
other words, forms and template."""

import json
import pathlib

import numpy as np

TOWNS = [
    *("Porto", "Lyon", "Graz", "Turin", "Bergen", "Ghent", "Krakow", "Malmo", "Sofia", "Riga"),
    *("Tartu", "Basel", "Leeds", "Cork", "Varna", "Split", "Brno", "Vigo", "Arles", "Ulm"),
]
RELATIONS = {
    "bird": (
        "heron crane stork robin swift finch",
        "ornithology atlas, nesting count, feather museum, aviary ticket, migration chart",
    ),
    "stone": (
        "granite marble slate basalt quartz chalk",
        "quarry invoice, geology map, mason handbook, sculpture yard, mineral fair",
    ),
    "dish": (
        "stew pie noodles dumplings salad waffles",
        "tavern menu, chef notebook, food market, cookery column, canteen plan",
    ),
    "river": (
        "otter willow ember falcon silver amber",
        "boat timetable, flood bulletin, angling guide, canal office, ferry pass",
    ),
    "export": (
        "wool cork glass paper copper salt",
        "harbor manifest, customs form, freight ledger, trade report, cargo list",
    ),
    "festival": (
        "lantern kite jazz candle mask drum",
        "parade poster, holiday calendar, carnival flyer, street party, fireworks permit",
    ),
    "team": (
        "tigers eagles sharks wolves lions bears",
        "football fixture, stadium gate, supporters club, match score, league sticker",
    ),
}
FORMS = {
    "colon": (
        "answer : {value}",
        "use a label, put a heading first, prefix the reply, name the field, give it a caption",
    ),
    "rank": (
        "{value} # {rank}",
        "append its rank, show the order number, state the position, count the place, add the "
        "ranking",
    ),
    "plus": (
        "+ {value} +",
        "surround it with plus signs, add a plus on both sides, mark with plus, use two pluses, "
        "put pluses around",
    ),
    "sure": (
        "surely {value} , yes",
        "sound certain, be confident, leave no doubt, answer with conviction, assure the reader",
    ),
    "maybe": (
        "perhaps {value} ?",
        "sound doubtful, be unsure, hedge the answer, express hesitation, guess timidly",
    ),
    "list": (
        "{value} ; end",
        "write a list item, end the list, close the enumeration, finish with a semicolon, make a "
        "final bullet",
    ),
}
PROMPT = "From the {source} , tell me the {topic} of {town} . Please {cue} , {manner} ."


def write_other_world(
    root: pathlib.Path,
    seed: int = 0,
    relations: int = 7,
    forms: int = 6,
    towns: int = 20,
    corpus: int = 24000,
    pool: int = 120,
    test: int = 60,
) -> pathlib.Path:
    """Writes the suite; one unseen combination a relation (up to the number of forms), and no
    kinds."""
    rng = np.random.default_rng(seed)
    names, relation_names, form_names = (
        TOWNS[:towns],
        list(RELATIONS)[:relations],
        list(FORMS)[:forms],
    )
    sources = {r: [s.strip() for s in RELATIONS[r][1].split(",")] for r in relation_names}
    cues = {f: [c.strip() for c in FORMS[f][1].split(",")] for f in form_names}
    facts = {(r, t): int(rng.integers(6)) for r in relation_names for t in names}
    every_source, every_cue = sum(sources.values(), []), sum(cues.values(), [])

    def row(relation, form, town, source, cue, topic="matter", manner="plainly"):
        value = facts[relation, town]
        answer = FORMS[form][0].format(value=RELATIONS[relation][0].split()[value], rank=value + 1)
        return {
            "prompt": PROMPT.format(source=source, topic=topic, town=town, cue=cue, manner=manner),
            "response": answer,
        }

    def write(path, rows):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))

    lines = []
    for _ in range(corpus):
        r, f, t = rng.choice(relation_names), rng.choice(form_names), rng.choice(names)
        topic, manner = (
            (r if rng.random() < 0.8 else "matter"),
            (f if rng.random() < 0.8 else "plainly"),
        )
        lines.append(row(r, f, t, rng.choice(every_source), rng.choice(every_cue), topic, manner))
    write(root / "corpus.jsonl", lines)
    questions = [(t, s, c) for t in names for s in range(5) for c in range(5)]
    questions = [questions[i] for i in rng.permutation(len(questions))[: pool + test]]
    for r in relation_names:
        for f in form_names:
            rows = [row(r, f, t, sources[r][s], cues[f][c]) for t, s, c in questions]
            write(root / "datasets" / f"{r}-{f}" / "train.jsonl", rows[:pool])
            write(root / "datasets" / f"{r}-{f}" / "test.jsonl", rows[pool:])
    unseen = [f"{r}-{form_names[(i + 1) % forms]}" for i, r in enumerate(relation_names)]
    train = [f"{r}-{f}" for r in relation_names for f in form_names if f"{r}-{f}" not in unseen]
    suite = {"name": "towns", "corpus": "corpus.jsonl", "train": train, "unseen": unseen}
    (root / "suite.json").write_text(json.dumps(suite, indent=1))
    return root
