"""More wordings of the operations and forms of `skills`, for the training tasks of its large form.

A decoder that sees a dozen of each has less use for learning them by heart. Of unseen tasks, those
of the kind "domain" alone have them.
"""

OPERATIONS = {
    "first": """
I only want the word that starts the list.
Pick out the initial entry.
From these three, keep the earliest one.
The word before the first comma, please.
Which of these was put down before the rest?
Copy the one on the far left.
Look at the line and report where it starts.
""",
    "second": """
I only want the word in the middle.
Pick out the entry that is neither first nor last.
From these three, keep the one in between.
The word between the two commas, please.
Which of these has another one before it and another one after it?
Copy the one at the centre.
Skip one word and report the following one.
""",
    "last": """
I only want the word that finishes the list.
Pick out the closing entry.
From these three, keep the latest one.
The word after the final comma, please.
Which of these was put down after the rest?
Copy the one on the far right.
Look at the line and report where it stops.
""",
    "ends": """
I only want the first word and the third.
Pick out the entries that are not in the middle.
From these three, drop the second one.
The word before the first comma and the word after the last one, please.
Which of these have a single neighbour?
Copy the one on the far left and the one on the far right.
Look at the line and report where it starts and where it stops.
""",
    "opening": """
I only want the first word and the second.
Pick out the entries that start the list.
From these three, drop the third one.
The two words before the second comma, please.
Which of these were put down before the last one?
Copy the one on the far left and the one next to it.
Read two words and report both.
""",
    "closing": """
I only want the second word and the third.
Pick out the entries that finish the list.
From these three, drop the first one.
The two words after the first comma, please.
Which of these were put down after the first one?
Copy the one in the middle and the one on the far right.
Skip one word and report the two that follow.
""",
    "plural_first": """
I only want the first word, but with more than one of it.
Put the initial entry into the plural form.
Say the word that starts the list as you would say three of them.
The word before the first comma, made plural, please.
What do you call two or more of the thing that comes first?
Pluralise the one on the far left.
Imagine many of what the line starts with and name them.
""",
    "plural_last": """
I only want the last word, but with more than one of it.
Put the final entry into the plural form.
Say the word that finishes the list as you would say three of them.
The word after the final comma, made plural, please.
What do you call two or more of the thing that comes last?
Pluralise the one on the far right.
Imagine many of what the line ends with and name them.
""",
    "initial_first": """
I only want the first letter of the word that starts the list.
Cut the initial entry down to its first letter.
With which character does word one begin?
The letter right at the start of the line, please.
Abbreviate the first word to one letter.
Copy one letter, the one on the far left.
If you were to index the first word, under which letter would it be?
""",
    "initial_last": """
I only want the first letter of the word that finishes the list.
Cut the final entry down to its first letter.
With which character does word three begin?
The letter right after the final comma, please.
Abbreviate the last word to one letter.
Copy one letter, the one with which the far right word begins.
If you were to index the last word, under which letter would it be?
""",
}
FORMS = {
    "plain": """
Reply with the answer alone.
Nothing more than that.
Do not wrap it in anything.
Keep the reply bare.
Only say what was asked for.
Skip all punctuation around it.
No formatting.
""",
    "quoted": """
Wrap it in quotation marks.
Set it between double quotes.
Give me the answer as a quotation.
Quotation marks on both sides, please.
The reply should be a quoted string.
Surround what you say with quotes.
Begin and end with a double quote.
""",
    "shouted": """
Put an exclamation mark after it.
Say it loudly.
Yell the answer.
The reply should end in an exclamation mark.
Say it with excitement.
Call it out.
Close with the mark of an exclamation.
""",
    "sentence": """
Wrap it in a full sentence.
A complete sentence, please.
Do not give a single word, give a sentence.
Reply in sentence form.
The reply should read as a sentence.
Tell me by a whole sentence.
Use a sentence that says what the answer is.
""",
    "twice": """
Write it down two times.
Once is not enough: repeat it.
Say it, then say it once more.
I want to read it twice.
The reply should have it two times in a row.
Give it and give it again.
Let the answer appear twice.
""",
    "brackets": """
Wrap it in square brackets.
Set it between brackets.
Square brackets on both sides, please.
The reply should stand in brackets.
Surround what you say with square brackets.
Give me the bracketed answer.
Begin with a bracket and end with one.
""",
    "bullet": """
Make a bullet point of it.
A dash, then the answer.
The reply should be a bullet.
Write one line of a bulleted list.
Format it like an entry of a list with dashes.
Bullet style, please.
Set a dash and a space in front of it.
""",
}
