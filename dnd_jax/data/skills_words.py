"""The words, operations and forms of the embedded suite `skills`: tables, so that no package
changes it."""

import dataclasses
from collections.abc import Callable

from dnd_jax.data.composed import Task

# Singular, or singular:plural where that is no mere s.
_NOUNS = """
cat dog horse cow pig goat duck hen crow owl frog toad snake lizard turtle rabbit squirrel
mouse:mice wolf:wolves fox:foxes bear camel monkey donkey tiger lion zebra spider goose:geese
apple pear plum peach:peaches cherry:cherries berry:berries lemon melon carrot onion
potato:potatoes tomato:tomatoes bean nut egg pie cake cookie sandwich:sandwiches sausage
pancake biscuit noodle pepper
hammer saw drill nail screw wrench:wrenches ladder rope bucket shovel rake brush:brushes broom
needle knife:knives fork spoon bowl plate cup kettle pan jar bottle
hat cap coat shirt jacket sweater belt sock shoe boot glove scarf:scarves dress:dresses skirt
button ring watch:watches necklace purse wallet
chair table desk bed lamp shelf:shelves couch:couches mirror carpet curtain pillow blanket
clock candle vase basket box:boxes drawer door window
car bus:buses truck train boat ship plane bike wagon rocket tractor taxi canoe
river lake hill mountain valley forest island beach:beaches cloud star moon leaf:leaves
tree flower bush:bushes rock stone field
book pen pencil ruler map letter card ticket coin key phone camera radio drum flute guitar
piano violin
baker doctor nurse farmer pilot painter singer dancer lawyer teacher
king queen
"""
PLURALS = {
    singular: plural or f"{singular}s"
    for singular, _, plural in (noun.partition(":") for noun in _NOUNS.split())
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """What an instruction asks for, in several wordings, a line each."""

    text: str  # those of training tasks, then the held ones
    more: str = ""  # further ones of training tasks

    @property
    def wordings(self) -> tuple[str, ...]:
        return tuple(self.text.strip().splitlines())

    def said(self, task: Task) -> list[str]:
        """Those that the prompts of a task may have."""
        more = [] if task.held else self.more.strip().splitlines()
        return [*(self.wordings[i] for i in task.phrases()), *more]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Operation(Part):
    """What is made of three words. Operations of one family are much alike."""

    family: str
    of: Callable[[str, str, str], str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Form(Part):
    """How an answer {x} is written."""

    answer: str


OPERATIONS = {
    "first": Operation(
        family="position",
        of=lambda a, b, c: a,
        text="""
Which word comes first in this list?
Give the first of these words.
Take the word at the start of the list.
What is the first item?
Name the word that opens the list.
Tell me which word is at the very beginning.
Find the leading word of the line.
Say the word in front of all the others.
""",
    ),
    "second": Operation(
        family="position",
        of=lambda a, b, c: b,
        text="""
Which word stands in the middle of this list?
Give the second of these words.
Take the word between the two others.
What is the middle item?
Name the word that comes second.
Tell me which word is number two.
Find the central word of the line.
Say the word with one neighbour on each side.
""",
    ),
    "last": Operation(
        family="position",
        of=lambda a, b, c: c,
        text="""
Which word comes last in this list?
Give the last of these words.
Take the word at the end of the list.
What is the final item?
Name the word that closes the list.
Tell me which word is at the very end.
Find the ending word of the line.
Say the word behind all the others.
""",
    ),
    "ends": Operation(
        family="pair",
        of=lambda a, b, c: f"{a} {c}",
        text="""
Which words come first and last in this list?
Give the first and the last of these words.
Take the words at the start and at the end of the list.
What are the first and the final item?
Name the word that opens the list and the one that closes it.
Tell me both outer words, from left to right.
Leave out the middle word and keep the rest.
Say the two words at the edges, in order.
""",
    ),
    "opening": Operation(
        family="pair",
        of=lambda a, b, c: f"{a} {b}",
        text="""
Which two words come first in this list?
Give the first two of these words.
Take the two words at the start of the list.
What are the first and the second item?
Name the pair of words that opens the list.
Tell me both words before the last one.
Leave out the final word and keep the rest.
Say the leading two words, in order.
""",
    ),
    "closing": Operation(
        family="pair",
        of=lambda a, b, c: f"{b} {c}",
        text="""
Which two words come last in this list?
Give the last two of these words.
Take the two words at the end of the list.
What are the second and the third item?
Name the pair of words that closes the list.
Tell me both words after the first one.
Leave out the opening word and keep the rest.
Say the trailing two words, in order.
""",
    ),
    "plural_first": Operation(
        family="plural",
        of=lambda a, b, c: PLURALS[a],
        text="""
What is the plural of the first word?
Give the plural of the word that comes first.
Turn the first word into its plural.
What is the first item called when there are many of them?
Name several of what opens the list.
Write the opening word as if there were two of them.
Make the leading word stand for more than one.
Name a whole group of what stands in front.
""",
    ),
    "plural_last": Operation(
        family="plural",
        of=lambda a, b, c: PLURALS[c],
        text="""
What is the plural of the last word?
Give the plural of the word that comes last.
Turn the last word into its plural.
What is the final item called when there are many of them?
Name several of what closes the list.
Write the ending word as if there were two of them.
Make the trailing word stand for more than one.
Name a whole group of what stands at the end.
""",
    ),
    "initial_first": Operation(
        family="letter",
        of=lambda a, b, c: a[0],
        text="""
What letter does the first word begin with?
Give the initial of the word that comes first.
Take the first letter of the first word.
Which letter starts the opening item?
Name the letter at the beginning of the list.
Tell me how the spelling of the leading word starts.
Find the opening character of word number one.
Say only the front letter of the front word.
""",
    ),
    "initial_last": Operation(
        family="letter",
        of=lambda a, b, c: c[0],
        text="""
What letter does the last word begin with?
Give the initial of the word that comes last.
Take the first letter of the last word.
Which letter starts the final item?
Name the letter at the beginning of the closing word.
Tell me how the spelling of the ending word starts.
Find the opening character of word number three.
Say only the front letter of the rearmost word.
""",
    ),
}
# New in "operation" tasks: each of a family that training tasks have.
NEW_OPERATIONS = {
    "plural_second": Operation(
        family="plural",
        of=lambda a, b, c: PLURALS[b],
        text="""
What is the plural of the middle word?
Give the plural of the word that comes second.
Turn the second word into its plural.
What is the middle item called when there are many of them?
Name several of what stands in the middle.
""",
    ),
    "initial_second": Operation(
        family="letter",
        of=lambda a, b, c: b[0],
        text="""
What letter does the middle word begin with?
Give the initial of the word that comes second.
Take the first letter of the second word.
Which letter starts the middle item?
Name the letter at the beginning of the middle word.
""",
    ),
}
FORMS = {
    "plain": Form(
        answer="{x}",
        text="""
Answer with nothing else.
Write the bare answer.
No other words, please.
Just the answer will do.
Keep it plain.
Add nothing to it.
Leave it as it is.
Without any decoration.
""",
    ),
    "quoted": Form(
        answer='"{x}"',
        text="""
Put it in quotation marks.
Write the answer in double quotes.
Quote it.
Use quotation marks around it.
Answer in quotes.
Cite it as speech.
Enclose it as one would a quotation.
Open and close it with speech marks.
""",
    ),
    "shouted": Form(
        answer="{x}!",
        text="""
Add an exclamation mark.
Shout it.
End with an exclamation mark.
Exclaim the answer.
Write it as an exclamation.
Show excitement at the end.
Make it sound like a cry.
Finish it as one ends a command.
""",
    ),
    "sentence": Form(
        answer="The answer is {x}.",
        text="""
Answer in a whole sentence.
Write a full sentence.
Reply with a complete sentence.
Make a sentence of it.
Say it in a sentence.
Let the reply have a subject and a verb.
Begin the reply with The answer is.
Phrase it as a statement.
""",
    ),
    "twice": Form(
        answer="{x} {x}",
        text="""
Say it twice.
Repeat the answer once.
Write it two times.
Double it.
Give the answer again after itself.
Echo it.
State it and then state it again.
Duplicate what you say.
""",
    ),
    "brackets": Form(
        answer="[{x}]",
        text="""
Put it in square brackets.
Write the answer inside brackets.
Use square brackets around it.
Bracket it.
Answer in brackets.
Enclose it as a list of one.
Box it with bracket signs.
Open and close it with bracket signs.
""",
    ),
    "bullet": Form(
        answer="- {x}",
        text="""
Write it as a bullet point.
Make it an item of a list.
Put a dash before it.
Answer as a bulleted line.
Use a bullet.
Give it as one line of a to-do list.
Start the reply with a hyphen.
Lead in with a dash.
""",
    ),
}
NEW_FORMS = {
    "stars": Form(
        answer="*{x}*",
        text="""
Put a star on each side.
Write the answer between asterisks.
Use asterisks around it.
Mark it with a star before and after.
Answer between two stars.
""",
    ),
    "colon": Form(
        answer="Answer: {x}",
        text="""
Write Answer and a colon before it.
Label it as the answer, with a colon.
Use the label Answer with a colon.
Begin with Answer and a colon.
Put the word Answer and a colon in front.
""",
    ),
}
