"""`dnd verify-adapter --server`: what a server does with an adapter, against PyTorch and PEFT."""

import pathlib

import numpy as np
import pytest
from openai_server import OpenaiServer
from small_models import write_qwen

from dnd_jax.base.hf_config import load_base_config
from dnd_jax.base.served import Served
from dnd_jax.core.errors import InputError
from dnd_jax.lora.adapter import load_adapter, save_adapter
from dnd_jax.lora.layout import MODULE_ORDER
from dnd_jax.lora.names import renamed
from dnd_jax.lora.peft_settings import AdapterConfig
from dnd_jax.main import main


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> pathlib.Path:
    return write_qwen(tmp_path_factory.mktemp("served") / "base")


def lora(base: pathlib.Path, folder: pathlib.Path, size: float = 0.2) -> pathlib.Path:
    rng = np.random.default_rng(0)
    shapes = load_base_config(base).lora_shapes(2, MODULE_ORDER)
    tensors = {k: rng.normal(size=s).astype(np.float32) * size for k, s in shapes.items()}
    return save_adapter(folder, tensors, AdapterConfig(str(base), 2, 4.0, MODULE_ORDER))


@pytest.fixture(scope="module")
def adapter(base) -> pathlib.Path:
    return lora(base, base.parent / "adapter")


def verified(capsys, adapter, url: str, *more: str, model: str = "task") -> tuple[int, str]:
    capsys.readouterr()
    words = f"--server={url}", f"--model={model}", *more
    status = main(["verify-adapter", str(adapter), *words])
    captured = capsys.readouterr()
    return status, captured.err if status else captured.out


def test_a_server_that_applies_it(base, adapter, capsys):
    with OpenaiServer(base, {"task": adapter}).running() as url:
        status, text = verified(capsys, adapter, url)
        assert status == 0 and "ok: the server applies the adapter" in text, text
        status, text = verified(capsys, adapter, f"{url}/v1", "--served-base=the-base")
        assert status == 0, text


def test_an_adapter_with_a_servers_names(base, adapter, tmp_path, capsys):
    """PyTorch reads its names as PEFT knows them; a server that does not know them ignores it."""
    prefix, tensors = "model.language_model.", load_adapter(adapter)
    config = AdapterConfig(str(base), 2, 4.0, MODULE_ORDER)
    named = save_adapter(tmp_path / "named", renamed(tensors, "model.", prefix), config)
    assert all(key.startswith(f"{prefix}layers.") for key in load_adapter(named))
    with OpenaiServer(base, {"task": adapter}).running() as url:
        status, text = verified(capsys, named, url, f"--key-prefix={prefix}")
        assert status == 0 and f"by names with {prefix}layers." in text, text
        status, text = verified(capsys, named, url)
        assert status == 2 and "not an adapter of" in text
        status, text = verified(capsys, adapter, url, f"--key-prefix={prefix}")
        assert status == 2 and f"no tensor's name begins with {prefix}layers." in text
    with OpenaiServer(base, {"task": named}).running() as url:
        status, text = verified(capsys, named, url, f"--key-prefix={prefix}")
        assert status == 1 and f"which begin with {prefix}layers." in text


@pytest.mark.parametrize(
    ("fault", "status", "says"),
    [
        ("ignores", 1, "ignores the adapter"),
        ("twice", 1, "something else than the adapter says"),
        ("echo", 2, "`echo` and `logprobs`"),
        ("nonsense", 2, "OpenAI's interface"),
        ("500", 2, "500, it is broken"),
    ],
)
def test_a_server_that_does_not(base, adapter, capsys, fault, status, says):
    with OpenaiServer(base, {"task": adapter}, fault).running() as url:
        found, text = verified(capsys, adapter, url)
        assert found == status and says in text and url in text, text
        assert sum(url in line for line in text.splitlines()) == 1


def test_another_adapter_under_its_name(base, adapter, tmp_path, capsys):
    other = lora(base, tmp_path / "other", size=0.05)
    with OpenaiServer(base, {"task": other}).running() as url:
        status, text = verified(capsys, adapter, url)
        assert status == 1 and ("ignores" in text or "something else" in text), text


def test_another_base(base, adapter, tmp_path, capsys):
    other = write_qwen(tmp_path / "base", num_hidden_layers=3)
    with OpenaiServer(other, {"task": lora(other, tmp_path / "a")}).running() as url:
        status, text = verified(capsys, adapter, url)
        assert status == 1 and "is another model than" in text, text


def test_an_adapter_that_does_nothing_cannot_be_told(base, tmp_path, capsys):
    nothing = lora(base, tmp_path / "nothing", size=0.0)
    with OpenaiServer(base, {"task": nothing}).running() as url:
        status, text = verified(capsys, nothing, url)
        assert status == 1 and "cannot be told" in text, text


def test_a_token_and_a_model_that_is_not_there(base, adapter, tmp_path, capsys):
    (tmp_path / "token").write_text("secret\n")
    token = f"--token-file={tmp_path / 'token'}"
    with OpenaiServer(base, {"task": adapter}, token="secret").running() as url:
        assert verified(capsys, adapter, url, token)[0] == 0
        status, text = verified(capsys, adapter, url)
        assert status == 2 and "401, Unauthorized" in text
        status, text = verified(capsys, adapter, url, token, model="other")
        assert status == 2 and "The model does not exist" in text


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--server=nowhere", "--model=x"], "no URL"),
        (["--server=http://127.0.0.1:9", "--model=x"], "no answer"),
        (["--server=http://127.0.0.1:abc", "--model=x"], "no URL"),
        (["--server=http://[::1", "--model=x"], "no URL"),
        (["--server=http://127.0.0.1:8000/a b", "--model=x"], "no URL"),
        (["--server=http://127.0.0.1:9"], "--model is needed"),
        (["--model=x"], "--model is for --server"),
    ],
)
def test_words_that_cannot_be(adapter, capsys, words, says):
    assert main(["verify-adapter", str(adapter), *words]) == 2
    assert says in capsys.readouterr().err


def test_log_probabilities_are_those_of_the_tokens(base, adapter):
    with OpenaiServer(base, {"task": adapter}).running() as url:
        server = Served(url)
        parents = {name: of.parent for name, of in server.models().items()}
        assert parents == {"the-base": "", "task": "the-base"}
        plain, shorter = server.logprobs("the-base", [[3, 5, 7, 9], [3, 5, 7]])
        assert plain.shape == (3,) and np.all(plain < 0)
        assert np.allclose(plain[:2], shorter, atol=1e-5)
        with pytest.raises(InputError, match="does not exist"):
            server.logprobs("none", [[3, 5]])
