"""The service's page (Gradio, at /page): prompts in, an adapter out, and the base's answers without
and with it, side by side."""

import asyncio
import pathlib
import re
import time
from collections.abc import AsyncIterator, Callable, Sequence

from dnd_jax.base.conversation import Reply, Sampling
from dnd_jax.core import packages
from dnd_jax.core.errors import InputError, first_line
from dnd_jax.data.sources import Example, said_fault, text_fault
from dnd_jax.generator.trained import span
from dnd_jax.serving.chat import BASE, PREFIX, Chat
from dnd_jax.serving.guard import Limits
from dnd_jax.serving.refusals import REFUSALS, told
from dnd_jax.serving.service import Order, Service
from dnd_jax.serving.store import Entry

gradio = packages.deferred("gradio")
gradio_utils = packages.deferred("gradio.utils")
responses = packages.deferred("fastapi.responses")

PATH = "/page"
LOOK = 0.25  # seconds between two looks at an order that is in work
KEPT = 3600  # seconds that a dropped file stays on the disk
AT_ONCE = 40  # visitors whose requests are in work at a time; the service itself queues them
KINDS = [".txt", ".jsonl", ".json", ".csv", ".tsv"]  # a small .parquet may hold millions of rows
TYPED = "One a line. Where one has several lines, leave an empty line between prompts."
CSS = """
.gradio-container { max-width: 1100px !important; margin: 0 auto !important; }
footer { display: none !important; }
"""
_EVENT = {"api_visibility": "private", "show_progress": "minimal"}
PEFT = """from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "{id}")  # the unpacked zip"""
VLLM = """curl -s http://127.0.0.1:8200/v1/chat/completions -H 'Content-Type: application/json' \\
     -d '{{"model": "dnd:{id}", "messages": [{{"role": "user", "content": "..."}}]}}'"""


class _Words:
    """What the page does with prompts: handlers of its events."""

    def __init__(self, service: Service, chat: Chat | None, limits: Limits):
        self._service, self._chat, self._limits = service, chat, limits
        self._generator = service.generator
        self.most = self._generator.condition.num_prompts
        self.fewest = self._generator.fewest
        self.wanted = span(self.fewest, self.most)

    def read(self, path: str | None) -> list[str]:
        """The prompts of a dropped file; none where there is no file."""
        if path is None:
            return []
        file = pathlib.Path(path).resolve()
        try:
            # Gradio checks both; a page that lets others read the machine is not to hang on it.
            if not file.is_relative_to(pathlib.Path(gradio_utils.get_upload_folder()).resolve()):
                raise InputError("this is no dropped file")
            if file.suffix.lower() not in KINDS:
                raise InputError(f"{file.name}: none of {', '.join(KINDS)}")
            prompts = self._generator.read(path)
            self._check_number(prompts)
        except InputError as error:
            line = first_line(error).replace(path, file.name)
            raise gradio.Error(line, print_exception=False) from None
        return prompts

    def _check_number(self, prompts: Sequence[str]) -> None:
        if len(prompts) > self._limits.prompts:
            raise InputError(f"{len(prompts)} prompts: at most {self._limits.prompts}")

    def count(self, of_file: Sequence[str], typed: str) -> str:
        """How many prompts there are, and how many are wanted."""
        have = len(of_file) + len(_typed(typed))
        if have < self.fewest:
            more = self.fewest - have
            return f"**{have}** of {self.wanted} prompts: {more} more, please."
        drawn = f"; the seed draws {self.most} of them" if have > self.most else ""
        return f"**{have}** prompts{drawn}."

    async def generate(
        self, of_file: Sequence[str], typed: str, seed: float, strength: float
    ) -> AsyncIterator[tuple]:
        """Yields what is seen of an order: (status, id, link, drawn prompts, closest tasks, lines
        for PEFT, for vLLM)."""
        prompts, started = [*of_file, *_typed(typed)], time.perf_counter()
        try:
            self._check_number(prompts)
            order = Order(tuple(prompts), int(seed or 0), float(strength))
            future, made = await asyncio.to_thread(self._service.order, order)
            waiting = asyncio.wrap_future(future)
            while not (await asyncio.wait([waiting], timeout=LOOK))[0]:
                ahead = max(self._service.waiting - 1, 0)
                behind = f", with {ahead} more in work" if ahead else ""
                seconds = time.perf_counter() - started
                yield f"generating{behind}: {seconds:.1f} s", *_nothing_made()
            entry = waiting.result()
        except Exception as error:
            yield "Not made.", *_nothing_made()
            raise _shown(error) from None
        yield _made(entry, self._generator.draw(prompts, order.seed), made)

    async def ask(self, id: str, question: str, system: str) -> AsyncIterator[tuple[str, str]]:
        """Yields the two answers as they come: (the base's, the adapter's)."""
        answers = {BASE: "", f"{PREFIX}{id}": ""}
        question, system = question or "", system or ""
        try:
            if not id:
                raise InputError("generate an adapter first")
            if fault := said_fault(question):
                raise InputError(f"the question {fault}")
            if fault := text_fault(system):
                raise InputError(f"the system text {fault}")
            asked = Example(question, "", system)
            for model in answers:
                async for piece in self._chat.ask(model, asked, (), Sampling()):
                    whole = isinstance(piece, Reply)
                    answers[model] = piece.text if whole else answers[model] + piece
                    yield tuple(answers.values())
        except Exception as error:
            raise _shown(error) from None


def _typed(text: str) -> list[str]:
    """The prompts of a text: its paragraphs where it has empty lines, else its lines."""
    text = (text or "").strip()
    parts = re.split(r"\n\s*\n", text)
    return [part for part in (parts if len(parts) > 1 else text.splitlines()) if part.strip()]


def _nothing_made() -> tuple:
    update = gradio.update
    return "", update(interactive=False, link=None), "", update(visible=False), "", ""


def _made(entry: Entry, drawn: Sequence[str], made: bool) -> tuple:
    how = "made" if made else "was there, made"
    status = f"**Adapter `{entry.id[:12]}`** of rank {entry.rank}: {how} in {entry.seconds:.2f} s."
    status += "".join(f"\n\n⚠️ {warning}" for warning in entry.warnings)
    closest = [[name, round(cosine, 2)] for name, cosine in entry.closest]
    return (
        status,
        entry.id,
        gradio.update(interactive=True, link=f"../v1/adapters/{entry.id}/download"),
        "\n".join(f"{number}. {prompt}" for number, prompt in enumerate(drawn, 1)),
        gradio.update(value=closest, visible=bool(closest)),
        PEFT.format(base=entry.base, id=entry.id),
        VLLM.format(id=entry.id),
    )


def _shown(error: Exception) -> Exception:
    """What a visitor is told of an error, in one line."""
    if not isinstance(error, tuple(REFUSALS)):
        return error
    return gradio.Error(told(error)[1], duration=None, print_exception=False)


def make_page(service: Service, chat: Chat | None, limits: Limits):
    """The page, a `gradio.Blocks`. chat: where a base can be asked."""
    words = _Words(service, chat, limits)
    adapter = service.generator.adapter
    with gradio.Blocks(title="dnd_jax", analytics_enabled=False, delete_cache=(KEPT, KEPT)) as page:
        made, of_file = gradio.State(""), gradio.State([])
        gradio.Markdown(
            f"# Prompts in, an adapter out\n{words.wanted} prompts of one task, without answers, "
            f"become a LoRA adapter of rank {adapter.rank} for `{adapter.base}`, at once."
            + (f" (It learnt on {adapter.weights}.)" if adapter.weights else "")
        )
        with gradio.Row():
            with gradio.Column():
                gradio.Markdown("### 1. Your prompts")
                file = gradio.File(label="Drop a file of prompts", file_types=KINDS, height=130)
                typed = gradio.Textbox(label="or type them", info=TYPED, lines=8, max_lines=16)
                count = gradio.Markdown(words.count([], ""))
                with gradio.Accordion("Seed and strength", open=False):
                    seed = gradio.Number(0, label="Seed: draws the prompts", precision=0, minimum=0)
                    strength = gradio.Slider(0.1, 3, 1, step=0.1, label="Strength of the effect")
                press = gradio.Button("Generate the adapter", variant="primary")
            with gradio.Column():
                gradio.Markdown("### 2. Your adapter")
                status = gradio.Markdown("None yet.")
                closest = gradio.Dataframe(
                    headers=["closest training tasks", "cosine"], interactive=False, visible=False
                )
                download = gradio.Button("Download (zip)", interactive=False, link_target="_blank")
                with gradio.Accordion("Prompts that were drawn", open=False):
                    drawn = gradio.Textbox(label="drawn", lines=4, interactive=False)
                with gradio.Accordion("Use it with PEFT and vLLM", open=False):
                    as_lines = {"interactive": False, "wrap_lines": True, "lines": 2}
                    peft = gradio.Code(language="python", label="PEFT", **as_lines)
                    vllm = gradio.Code(language="shell", label="vLLM", **as_lines)
        gradio.Markdown("### 3. Ask the base without it and with it")
        if chat is None:
            gradio.Markdown("Start `dnd serve` with `--base=BASE` to ask here.")
        else:
            question = gradio.Textbox(label="Question", lines=2)
            with gradio.Accordion("System text", open=False):
                system = gradio.Textbox(show_label=False, lines=2)
            ask = gradio.Button("Ask both", variant="primary")
            with gradio.Row():
                plain = gradio.Textbox(label="base", lines=4, interactive=False)
                adapted = gradio.Textbox(label="with the adapter", lines=4, interactive=False)
            press.click(lambda: ("", ""), outputs=[plain, adapted], **_EVENT)  # of another adapter
            asked = {"fn": words.ask, "inputs": [made, question, system]}
            ask.click(**asked, outputs=[plain, adapted], **_EVENT)
        file.change(words.read, file, of_file, **_EVENT)
        for changed in (of_file, typed):
            changed.change(words.count, [of_file, typed], count, **_EVENT)
        outputs = [status, made, download, drawn, closest, peft, vllm]
        press.click(words.generate, [of_file, typed, seed, strength], outputs, **_EVENT)
    page.has_launched = True  # else Gradio opens any path that a visitor names
    return page.queue(default_concurrency_limit=AT_ONCE)


def mount_page(app, service: Service, chat: Chat | None, limits: Limits) -> Callable[[], None]:
    """Puts the page at PATH of a `fastapi.FastAPI`; / leads there. Returns what ends the
    connections that open pages hold, which would keep the service from ending."""

    @app.get("/", include_in_schema=False)
    async def to_page():
        return responses.RedirectResponse(f"{PATH.removeprefix('/')}/")

    theme = gradio.themes.Default(  # fonts that lie on the visitor's machine
        font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )
    gradio.mount_gradio_app(
        app,
        make_page(service, chat, limits),
        path=PATH,
        footer_links=[],
        run_history=False,
        show_error=False,
        max_file_size=limits.body,
        theme=theme,
        css=CSS,
    )
    mounted = app.routes[-1].app
    return lambda: mounted.stop_event.set()
