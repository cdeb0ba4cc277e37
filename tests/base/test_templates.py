"""Chat templates of every kind: what is said stands in what they show, or one line says why not;
what is taught is how the template itself goes on."""

import json
import pathlib
import re

import pytest

from dnd_jax.base import sequences
from dnd_jax.base.chat import answer_text, render
from dnd_jax.base.folder import load_tokenizer
from dnd_jax.base.new_tokenizer import build_tokenizer
from dnd_jax.base.sequences import encode, how_taught, token_pairs
from dnd_jax.core.errors import InputError
from dnd_jax.data.sources import Example

SAID, SYSTEM = "Why so?\nA: one\nB: two", "Be brief."
# The kinds that are met, cut down: `turn` shows a message, `ask` is what precedes an answer.
ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
EACH = "{% for m in messages %}"
TURN = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
PLAIN = EACH + TURN + "{% endfor %}" + ASK
PART = "{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}"
OWN_SYSTEM = {
    "plain": PLAIN,
    "default system text": "{% if messages[0].role != 'system' %}<|im_start|>system\nHi.<|im_end|>"
    "{% endif %}" + PLAIN,
    "trims": PLAIN.replace("m.content", "m.content | trim"),
    "header asked for or not": PLAIN.replace(ASK, ""),
    "header behind spaces": EACH + "{{ {'user': 'USER: ', 'assistant': ' ASSISTANT: '}.get(m.role, "
    "'') + m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}",
    "end of the last turn alone": PLAIN + "{% if not add_generation_prompt %}{{ eos_token }}"
    "{% endif %}",
    "leading and closing spaces": EACH + "{% if m.role == 'assistant' %}{{ ' ' + m.content + ' ' + "
    "eos_token }}{% else %}{{ bos_token }}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}",
    "channels": EACH + "{% if m.role == 'assistant' %}<|im_start|>assistant<begin>final<begin>{{ "
    "m.content }}<|im_end|>{% else %}" + TURN + "{% endif %}{% endfor %}{% if add_generation_prompt"
    " %}<|im_start|>assistant{% endif %}",
    "lists of parts": EACH + TURN.replace("{{ m.content }}", PART) + "{% endfor %}" + ASK,
    "a list where it is one": EACH
    + TURN.replace(
        "{{ m.content }}", f"{{% if m.content is string %}}{{{{ m.content }}}}{{% else %}}{PART}"
        "{% endif %}",
    )
    + "{% endfor %}" + ASK,
    "a list of the system alone": EACH + "{% if m.role == 'system' %}{{ m.content[0].text }}"
    "<|im_end|>{% else %}" + TURN + "{% endif %}{% endfor %}" + ASK,
    "needs a system message": "{% if messages[0].role != 'system' %}{{ raise_exception('system "
    "first') }}{% endif %}" + PLAIN,
    "marked for training": EACH + "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}"
    "<|im_end|>\n{% endif %}{% endfor %}" + ASK,
    "unknown variables": "{% if tools %}{{ tools }}{% endif %}{{ custom_text }}" + PLAIN,
}  # fmt: skip
NO_SYSTEM = {
    "raises for it": "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}"
    "{% endif %}" + PLAIN,
    "passes it over": EACH + "{% if m.role != 'system' %}" + TURN + "{% endif %}{% endfor %}" + ASK,
    "changes it": PLAIN.replace("m.content", "(m.content|upper if m.role == 'system' else "
    "m.content)"),
    "sees the last alone": "{% set m = messages[-1] %}{% if m.role == 'user' %}" + TURN + ASK
    + "{% else %}" + TURN + "{% endif %}",
    "parts, and passes it over": EACH + "{% if m.role != 'system' %}"
    + TURN.replace("{{ m.content }}", PART) + "{% endif %}{% endfor %}" + ASK,
    "roles in turns": EACH + "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}" + TURN + "{% endfor %}" + ASK,
}  # fmt: skip
REFUSED = {
    "changes": (PLAIN.replace("m.content", "m.content | upper"), "does not show a user's prompt"),
    "shows nothing": ("Hello!", "does not show a user's prompt"),
    "is empty": ("", "does not show a user's prompt"),
    "knows other roles": (
        EACH + "{% if m.role != 'human' %}{{ raise_exception('no role ' + m.role) }}{% endif %}"
        "{% endfor %}",
        "does not show a user's prompt: no role system",
    ),
    "is broken": ("{% for m in messages %}{{ m.content }", "does not show a user's prompt: "),
    "needs tools": ("{{ tools[0].name }}" + PLAIN, "does not show a user's prompt: "),
    "loops for ever": ("{{ range(10**9)|list }}" + PLAIN, "does not show a user's prompt: "),
    "draws": ("{{ ['a', 'b']|random }}" + PLAIN, r"changes from time to time \(\|random\)"),
    "has its clock elsewhere": (
        "{% set now = strftime_now %}{{ now('%Y') }}" + PLAIN,
        "changes from time to time .strftime_now",
    ),
    "cuts": (PLAIN.replace("m.content", "m.content[:20]"), "changes the prompt 'Why so?"),
    "drops lines": (
        PLAIN.replace("m.content", "m.content.split('\n')[0]"),
        r"changes the prompt 'Why so\?.*' or leaves it out",
    ),
    "raises for this one": (
        EACH + "{% if 'two' in m.content %}{{ raise_exception('no two') }}{% endif %}" + TURN
        + "{% endfor %}",
        r"refuses the prompt .* \(no two\)",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    words = build_tokenizer([f"{SAID} {SYSTEM} yes"], 300)
    special = ["<|im_start|>", "<|im_end|>", "<begin>"]
    words.add_special_tokens({"bos_token": "<begin>", "additional_special_tokens": special})
    return words


@pytest.fixture
def with_template(tokenizer):
    def make(template):
        tokenizer.chat_template = template
        return tokenizer

    return make


def conversation(kind: str, system: str, response: str) -> list[dict]:
    """The messages that a template of this kind takes, as its model's own training would say."""
    own = kind in OWN_SYSTEM
    prompt = SAID if own or not system else f"{system}\n\n{SAID}"
    said = [("user", prompt), ("assistant", response)]
    if own and (system or kind == "needs a system message"):
        said.insert(0, ("system", system))
    parts = {"lists of parts": "all", "parts, and passes it over": "all"}.get(kind, "")
    if kind == "a list of the system alone":
        parts = "system"
    return [
        {"role": r, "content": [{"type": "text", "text": t}] if parts in ("all", r) else t}
        for r, t in said
    ]


@pytest.mark.parametrize("kind", [*OWN_SYSTEM, *NO_SYSTEM])
@pytest.mark.parametrize("system", ["", SYSTEM])
@pytest.mark.parametrize("response", ["yes", " yes, so\n"])
def test_what_is_taught_is_what_the_template_shows(with_template, kind, system, response):
    """Prompt and answer together are the beginning of the whole conversation as transformers
    renders it, up to the token that ends the assistant's turn; and what the base is asked is what
    transformers asks, with the header that some templates add only to a whole conversation."""
    read = with_template((OWN_SYSTEM | NO_SYSTEM)[kind])
    messages = conversation(kind, system, response)
    whole = read.apply_chat_template(messages, tokenize=False)
    asked = read.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    ours, answer = render(read, SAID, system), answer_text(read, response)
    assert ours.startswith(asked) and SAID in ours and system in ours
    if kind == "sees the last alone":  # whose whole conversation has no prompt
        assert answer == f"{response}<|im_end|>"
    else:
        assert whole.startswith(ours + answer), (ours, answer, whole)
    assert ours == asked or kind.startswith("header") or kind == "channels"
    end = answer.rstrip().rsplit("yes", 1)[1].removeprefix(", so").strip()
    assert end in ("<|im_end|>", "<end>")
    data = encode(read, [Example(SAID, response, system)], 500)
    ids = data.ids[0, data.start[0] : data.end[0]].tolist()
    assert ids[-1] == read.convert_tokens_to_ids(end) and ids.count(ids[-1]) == 1
    assert read.decode(data.ids[0]) == ours + answer


@pytest.mark.parametrize("kind", NO_SYSTEM)
def test_suites_that_differ_in_their_system_texts_alone_differ(with_template, kind):
    read = with_template(NO_SYSTEM[kind])
    texts = [render(read, SAID, system) for system in (SYSTEM, "Answer in French.", "")]
    assert len(set(texts)) == 3 and f"{SYSTEM}\n\n{SAID}" in texts[0]


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_in_one_line_that_names_the_file(with_template, tmp_path, kind):
    template, why = REFUSED[kind]
    with_template(template).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    read = load_tokenizer(tmp_path)
    with pytest.raises(InputError, match=f"chat_template.jinja: .*{why}") as error:
        render(read, SAID, SYSTEM)
    assert "\n" not in str(error.value)


def test_an_answer_that_the_template_would_change_is_taught_whole(with_template):
    """A thought that only the template of a whole conversation leaves out."""
    read = with_template(PLAIN.replace("m.content", "m.content.split('</think>')[-1]"))
    thought = "<think>so</think>yes"
    assert answer_text(read, thought) == f"{thought}<|im_end|>"
    no_end = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    assert answer_text(with_template(no_end), "yes") == " yes<end>"
    assert render(with_template(no_end), "Why?") == "user: Why?\nassistant:"
    assert answer_text(with_template(None), "yes") == "yes<end>"
    only_user = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}" + (
        "{% endfor %}"
    )
    assert answer_text(with_template(only_user), "yes") == "yes<end>"


def test_a_response_that_brings_its_end_with_it_is_refused(with_template):
    """As tools write them that add end tokens to their data: it could never be scored right."""
    for template, end in ((PLAIN, "<|im_end|>"), (None, "<end>")):
        rows = [Example("Why?", "yes"), Example("Why?", f"no{end}", "", "rows.jsonl:2")]
        with pytest.raises(InputError, match=re.escape(f"rows.jsonl:2: its response has '{end}'")):
            encode(with_template(template), rows, 500)


def test_no_end_of_the_base_may_stand_in_a_response(with_template):
    """Of those that only its generation settings or its tokenizer name, too."""
    read = with_template(PLAIN)
    taught, *others = read.convert_tokens_to_ids(["<|im_end|>", "<end>", "<begin>"])
    for end in others:
        said = f"no{read.decode([end])}so"
        rows = [Example("Why?", "yes"), Example("Why?", said, "", "rows.jsonl:2")]
        for ends in ((taught, *others), (end,)):
            with pytest.raises(
                InputError, match="rows.jsonl:2: its response has .<(end|begin)>. in it"
            ):
                encode(read, rows, 500, ends=ends)
        assert len(encode(read, rows, 500, ends=(taught,))) == 2


@pytest.mark.parametrize("template", [PLAIN, None])
def test_each_prompt_and_each_label_is_rendered_once(with_template, monkeypatch, template):
    read, calls = with_template(template), []
    labels = ["yes", " no ", "yes or no"]
    rows = [
        Example(f"{SAID} {i % 3}", label, SYSTEM if i else "") for i in range(4) for label in labels
    ]
    alone = [token_pairs(read, [row])[0] for row in rows]
    for name in ("render", "answer_text"):
        shows = getattr(sequences, name)
        monkeypatch.setattr(
            sequences, name, lambda *given, shows=shows: calls.append(given) or shows(*given)
        )
    assert token_pairs(read, rows) == alone
    assert len(calls) == 4 + len(labels)


def test_what_version_0_2_0_taught_the_same(with_template, monkeypatch):
    """An answer's tokens by themselves and the end token; those of SentencePiece are others."""
    digests = {}
    for name, template in {"none": None, "end": EACH + "{{ m.content }}{{ eos_token }}{% endfor %}",
                           "turn": PLAIN}.items():  # fmt: skip
        read = with_template(template)
        digests[name], before = how_taught(read)
        assert before == (name != "turn")
        assert how_taught(read)[0] == digests[name]
    assert len(set(digests.values())) == 3
    tokens = sequences._tokens
    monkeypatch.setattr(  # a space before each text, as SentencePiece puts it
        sequences, "_tokens", lambda read, texts: tokens(read, [f" {text}" for text in texts])
    )
    digest, before = how_taught(with_template(None))
    assert not before and digest != digests["none"]


@pytest.mark.parametrize("template", [5, ["a"], {"default": 5}, {"default": ["a"]}])
def test_a_template_that_is_no_text(with_template, template):
    with pytest.raises(InputError, match=r"chat_template .* is no text"):
        render(with_template(template), SAID)


def test_escaped_text_stands_where_it_was_to(with_template):
    odd = 'a < b & "c"\n\nd   e'
    for form in ("e", "tojson"):
        read = with_template(PLAIN.replace("m.content", f"m.content | {form}"))
        assert "<|im_start|>user" in render(read, odd, odd)


def test_the_day_is_the_same_for_ever(with_template, monkeypatch):
    clocks = "{% if strftime_now is defined %}{{ strftime_now('%d %B %Y') }}{% endif %}"
    for template in (f"{clocks}{PLAIN}", "{{ date_string }}" + PLAIN):
        shown = render(with_template(template), SAID)
        assert re.match(r"26 Jul(y)? 2024", shown)


def folder_with(tokenizer, root: pathlib.Path, template: str | None) -> pathlib.Path:
    tokenizer.chat_template = template
    tokenizer.save_pretrained(root)
    (root / "config.json").write_text('{"model_type": "qwen2"}')
    return root


def test_where_a_folder_keeps_its_template(tokenizer, tmp_path):
    """One of several, called default; a file before the tokenizer's settings; that of a processor
    where the tokenizer has none."""
    other = PLAIN.replace("im_start", "begin")

    def shown(root: pathlib.Path) -> str:
        text = render(load_tokenizer(root), SAID)
        assert text == load_tokenizer(root).apply_chat_template(
            [{"role": "user", "content": SAID}], tokenize=False, add_generation_prompt=True
        )
        return text

    two = folder_with(tokenizer, tmp_path / "two", {"default": PLAIN, "tool_use": other})
    assert (two / "additional_chat_templates" / "tool_use.jinja").is_file()
    first = shown(two)
    settings = two / "tokenizer_config.json"
    both = json.loads(settings.read_text()) | {"chat_template": other}
    settings.write_text(json.dumps(both))
    assert shown(two) == first
    listed = folder_with(tokenizer, tmp_path / "listed", None)
    named = [{"name": "default", "template": PLAIN}, {"name": "rag", "template": other}]
    settings = listed / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": named}))
    assert shown(listed) == first
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": named[1:]}))
    with pytest.raises(InputError, match=r"several chat templates \(rag\) and none called default"):
        render(load_tokenizer(listed), SAID)
    processor = folder_with(tokenizer, tmp_path / "processor", None)
    (processor / "chat_template.json").write_text(json.dumps({"chat_template": PLAIN}))
    assert shown(processor) == first
