"""The large form of the suite `skills`: hundreds of training tasks, for a training that needs no
LoRA a task.

    dnd suite --name=skills_large --out=DIR [--config.seed=0]

The operations and forms of dnd_jax/data/skills.py on lists of nouns, names, cities, numbers and so
on ("Which city comes first in this list? Quote it."), in more wordings
(dnd_jax/data/skills_wordings.py). What skills never has together is together in no
domain, so its unseen tasks are these as well, to the byte: the scores of both suites compare. And
those of the kind "domain": trained operations and forms on lists of what no training task has.
"""

import dataclasses
import os

import numpy as np

from dnd_jax.data import skills_wordings
from dnd_jax.data.composed import MIXED, Task, Tasks, named, suite_name, write_suite
from dnd_jax.data.skills import Parts, Rows, draw, draw_lists, rows_of
from dnd_jax.data.skills_words import FORMS, OPERATIONS, Operation

NEW_TASKS = 4  # of the kind "domain"


@dataclasses.dataclass(frozen=True)
class Domain:
    """What lists are of. families: those of the operations that are asked about them."""

    one: str  # what one of them is called
    many: str
    items: tuple[str, ...]
    families: tuple[str, ...] = ("position", "pair", "letter")

    def ask(self, operation: Operation) -> Operation:
        """The operation, in wordings that name the domain."""
        text, more = (
            of.replace("words", self.many).replace("word", self.one)
            for of in (operation.text, operation.more)
        )
        return dataclasses.replace(operation, text=text, more=more)


def _items(text: str) -> tuple[str, ...]:
    return tuple(text.split())


MONTHS = _items("""
January February March April May June July August September October November December
""")
DOMAINS = {
    "names": Domain(
        "name",
        "names",
        _items("""
Alice Arthur Barbara Bruno Carmen Charles Daisy Daniel Edith Edward Emma Ethan Flora Frank Grace
George Hannah Henry Ida Isaac Jane Jack Julia Kevin Laura Lewis Lucy Martin Mary Nancy Nathan Oliver
Paula Philip Rachel Ralph Robert Ruth Samuel Sarah Sophie Steven Susan Thomas Ursula Victor William
Wendy
"""),
    ),
    "cities": Domain(
        "city",
        "cities",
        _items("""
Amsterdam Athens Bangkok Barcelona Beijing Berlin Boston Brussels Budapest Cairo Chicago Copenhagen
Dallas Delhi Denver Dublin Florence Geneva Hamburg Helsinki Houston Istanbul Jakarta Lagos Lima
Lisbon London Madrid Manila Melbourne Miami Montreal Moscow Munich Nairobi Naples Oslo Paris Prague
Rome Seattle Shanghai Stockholm Sydney Tokyo Toronto Venice Vienna Warsaw Zurich
"""),
    ),
    "verbs": Domain(
        "verb",
        "verbs",
        _items("""
answer arrive bake begin believe build burn buy call carry catch clean climb close cook count cover
cross cut dance dig draw drink drive eat explain fall feed fight find finish fly follow forget give
grow hear help hide hold jump keep laugh learn leave listen move open paint play pull push read
remember run sail sell send sing sit sleep speak swim teach throw travel wait walk wash win write
"""),
    ),
    "adjectives": Domain(
        "adjective",
        "adjectives",
        _items("""
angry bitter brave bright broad busy calm careful cheap clean clever cold cool cruel curious dark
deep dirty dry dull early easy empty faithful famous fast fresh friendly full gentle happy heavy
honest hungry kind large lazy light lonely loud lucky narrow new noisy old patient polite poor proud
quick quiet rich rough sad sharp short shy silent simple slow small smooth soft strong sweet tall
thick thin tired warm weak wide wild wise young
"""),
    ),
    "numbers": Domain(
        "number", "numbers", tuple(str(n) for n in range(10, 1000, 7)), ("position", "pair")
    ),
    "dates": Domain(
        "date",
        "dates",
        tuple(f"{month} {day}" for month in MONTHS for day in range(1, 29, 3)),
        ("position", "pair"),
    ),
}
NEW_DOMAIN = Domain(
    "country",
    "countries",
    _items("""
Argentina Australia Austria Belgium Brazil Bulgaria Canada Chile China Colombia Croatia Cuba Denmark
Egypt Ethiopia Finland France Germany Ghana Greece Hungary Iceland India Indonesia Iran Ireland
Israel Italy Japan Kenya Malaysia Mexico Morocco Nepal Norway Pakistan Peru Poland Portugal Romania
Russia Spain Sweden Switzerland Thailand Turkey Ukraine Vietnam
"""),
)
EVERY = DOMAINS | {"countries": NEW_DOMAIN}


def write_skills_large(out: str | os.PathLike, seed: int = 0, most: int = 0) -> None:
    """Writes the suite folder `out`. The seed draws what it draws of skills, the lists of the other
    domains and the unseen tasks of the new one. most: unseen tasks of each kind; 0: all."""
    drawn, rng = draw(seed), np.random.default_rng([seed, 136])
    lists = {name: draw_lists(rng, domain.items) for name, domain in EVERY.items()}
    apart = {(task.first, task.second) for task in drawn.unseen["halves"].values()}
    train = drawn.train | {
        name: task for domain in DOMAINS for name, task in _tasks(domain, apart).items()
    }
    unseen = drawn.unseen | {"domain": named(_differing(rng, _tasks("countries", apart)))}

    def rows(task: Task) -> Rows:
        domain, _, name = task.first.partition("_")
        if domain in EVERY:
            operation, form = _in_more(name, task.second)
            asked = EVERY[domain].ask(operation)
            return rows_of(task, (asked, form), lists[domain], drawn.wordings)
        if task.shows == MIXED:  # one that skills trains on
            parts = _in_more(task.first, task.second)
            return rows_of(task, parts, drawn.lists, drawn.wordings)
        return drawn.rows(task)

    write_suite(out, suite_name("skills_large", seed, most), train, unseen, rows, most)


def _in_more(operation: str, form: str) -> Parts:
    """Both in more wordings than `skills` has."""
    return (
        dataclasses.replace(OPERATIONS[operation], more=skills_wordings.OPERATIONS[operation]),
        dataclasses.replace(FORMS[form], more=skills_wordings.FORMS[form]),
    )


def _tasks(domain: str, apart: set[tuple[str, str]]) -> Tasks:
    """The tasks of a domain: its operations with all forms but those that stay apart."""
    pairs = [
        (f"{domain}_{name}", form)
        for name, operation in OPERATIONS.items()
        for form in FORMS
        if operation.family in EVERY[domain].families and (name, form) not in apart
    ]
    return named(pairs, shows=MIXED)


def _differing(rng: np.random.Generator, tasks: Tasks) -> list[tuple[str, str]]:
    """(operation, form) of NEW_TASKS of the tasks, no two of which have either in common."""
    pairs = [(task.first, task.second) for task in tasks.values()]
    found: list[tuple[str, str]] = []
    for i in rng.permutation(len(pairs)):
        first, second = pairs[i]
        if len(found) < NEW_TASKS and all(first != f and second != s for f, s in found):
            found.append((first, second))
    return found
