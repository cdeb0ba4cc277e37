"""The page in a real browser (Debian's chromium): `make test-browser`."""

import io
import json
import pathlib
import shutil
import signal
import time
import zipfile

import httpx
import pytest
from peft import PeftModel
from pipeline import when
from playwright.sync_api import expect, sync_playwright
from serve import prompts, serving
from transformers import AutoModelForCausalLM

from dnd_jax.base.torch_base import TorchBase
from dnd_jax.data.sources import Example
from dnd_jax.lora.adapter import load_adapter

pytestmark = [
    pytest.mark.slow,
    pytest.mark.long,
    pytest.mark.browser,
    pytest.mark.timeout(600),
    pytest.mark.xdist_group("serve"),
]

SECONDS = 60_000.0  # milliseconds: for what the page is waited for
QUESTION = "where is the bird ?"
# A sandbox of its own is not to be had as root; the rest keeps it from asking the network.
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
DROP = """([name, text]) => {
    const dropped = new DataTransfer();
    dropped.items.add(new File([text], name));
    return dropped;
}"""


@pytest.fixture(scope="module")
def browser():
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    assert path, "no chromium here: apt-get install chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, service):
    """The service's page, just opened; an error on the page fails the test."""
    url, _ = service
    page = opened(browser.new_page(viewport={"width": 1280, "height": 900}), url)
    faults = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    yield page
    page.close()
    assert not faults


def opened(page, url: str):
    page.set_default_timeout(SECONDS)
    page.goto(url)
    page.get_by_role("button", name="Generate the adapter").wait_for()
    return page


def drop(page, name: str, text: str) -> None:
    """Drops a file as a hand with a mouse does."""
    dropped = page.evaluate_handle(DROP, [name, text])
    page.get_by_text("Drop File Here").dispatch_event("drop", {"dataTransfer": dropped})


def plain(text: str) -> str:
    """Without the marks that a text field changes, such as a carriage return."""
    return "".join(c for c in text if c.isprintable())


def generate(page) -> None:
    page.get_by_role("button", name="Generate the adapter").click()


def says(page, text: str) -> None:
    expect(page.get_by_text(text).first).to_be_visible(timeout=SECONDS)


def test_drop_generate_ask_download(page, service, base, tmp_path):
    """A file is dropped, an adapter made, asked beside the base, downloaded and loaded by PEFT."""
    url, _ = service
    says(page, "4 prompts of one task, without answers, become a LoRA adapter of rank 2")
    says(page, "0 of 4 prompts: 4 more, please.")
    drop(page, "mine.jsonl", "\n".join(json.dumps({"prompt": p}) for p in prompts("page", 6)))
    says(page, "6 prompts; the seed draws 4 of them.")
    generate(page)
    says(page, "of rank 2: made in")
    says(page, "closest training tasks")
    page.get_by_text("Prompts that were drawn").click()
    drawn = page.get_by_label("drawn").input_value().splitlines()
    assert len(drawn) == 4 and all(line[3:] in prompts("page", 6) for line in drawn)
    page.get_by_text("Use it with PEFT and vLLM").click()
    says(page, 'PeftModel.from_pretrained(base, "')

    with page.expect_download() as download:
        page.get_by_text("Download (zip)").click()
    content = pathlib.Path(download.value.path()).read_bytes()
    folder = tmp_path / "adapter"
    zipfile.ZipFile(io.BytesIO(content)).extractall(folder)
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)

    page.get_by_label("Question").fill(QUESTION)
    page.get_by_role("button", name="Ask both").click()
    model = TorchBase(base, 1, 1)
    left = model.positions - len(model.prompt_ids([Example(QUESTION, "")])[0])
    for label, adapter in (("base", None), ("with the adapter", folder)):
        model.use(adapter)
        answer = model.decode(model.answer_ids([Example(QUESTION, "")], left))[0]
        shown = page.get_by_label(label, exact=True)
        deadline = time.monotonic() + SECONDS / 1000
        while plain(shown.input_value()) != plain(answer):
            assert time.monotonic() < deadline, (shown.input_value(), answer)
            time.sleep(0.1)
    assert any(x.any() for key, x in load_adapter(folder).items() if "lora_B" in key)


def test_prompts_are_typed(page):
    page.get_by_label("or type them").fill("\n".join(prompts("typed", 3)))
    says(page, "3 of 4 prompts: 1 more, please.")
    generate(page)
    says(page, "takes 4; add 1 more")
    page.get_by_label("or type them").fill("\n\n".join(f"one\nline {i}" for i in range(4)))
    says(page, "4 prompts.")
    generate(page)
    says(page, "of rank 2: made in")


def test_what_cannot_be_is_said_in_a_line(page):
    page.get_by_label("Question").fill(QUESTION)
    page.get_by_role("button", name="Ask both").click()
    says(page, "generate an adapter first")
    drop(page, "mine.jsonl", "{")
    says(page, "mine.jsonl:1: not JSON")
    page.get_by_label("or type them").fill("\n".join(f"x ** {i} % 7 != 2" for i in range(4)))
    says(page, "4 prompts.")
    generate(page)
    says(page, "far from everything the generator was trained on")
    page.get_by_label("or type them").fill("\n".join(["<b onmouseover=alert(1)>x</b>"] * 21))
    generate(page)
    says(page, "21 prompts: at most 20")


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_screen(browser, service, width):
    page = opened(browser.new_page(viewport={"width": width, "height": 844}), service[0])
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.close()


def test_it_asks_no_other_host(browser, service):
    url, asked = service[0], []
    page = browser.new_page()
    page.on("request", lambda request: asked.append(request.url))
    opened(page, url)
    assert asked and not [other for other in asked if not other.startswith((url, "data:", "blob:"))]
    page.close()


def test_a_token_is_a_password_and_an_open_page_ends_with_the_service(browser, run, tmp_path):
    token = tmp_path / "token"
    token.write_text("0123456789abcdef0123\n")
    with serving(run, tmp_path / "s", f"--token-file={token}") as (url, process):
        assert httpx.get(url).headers["WWW-Authenticate"].startswith("Basic")
        login = {"username": "anybody", "password": token.read_text().strip()}
        page = opened(browser.new_context(http_credentials=login).new_page(), url)
        says(page, "Start dnd serve with --base=BASE to ask here.")
        page.get_by_label("or type them").fill("\n".join(prompts("secret")))
        says(page, "4 prompts.")
        generate(page)
        says(page, "of rank 2: made in")
        process.send_signal(signal.SIGTERM)
        assert not when(process, lambda: False, timeout=20)
        assert process.returncode == 0
        page.close()
