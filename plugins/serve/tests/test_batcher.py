"""Which texts make a batch, weights that runs share, and a failed batch."""

import asyncio
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("fastapi", reason="needs the plugin 'serve'")

from serve_answers import TEXTS

from lightning_lora import load_run
from lightning_lora.models.quantization import Quantization
from lightning_lora.training import module
from lightning_lora_serve.batcher import Batcher, batch_threads, choose_batch
from lightning_lora_serve.served_run import ServedRun, SharedWeights
from lightning_lora_serve.server import ServingMetrics


def queue(*texts: tuple[Any, int]) -> list[Any]:
    return [SimpleNamespace(request=SimpleNamespace(run=run), tokens=tokens) for run, tokens in texts]


def test_a_batch_is_of_one_run_and_of_texts_of_similar_length() -> None:
    one, other = (SimpleNamespace(packed=False, batch_tokens=64) for _ in range(2))
    waiting = queue((one, 16), (other, 16), (one, 64), (one, 24), (one, 16), (one, 8))
    batch = choose_batch(waiting)
    assert [each.tokens for each in batch] == [16, 24] and all(each.request.run is one for each in batch)
    packed = SimpleNamespace(packed=True, batch_tokens=100)
    assert [each.tokens for each in choose_batch(queue(*((packed, n) for n in (16, 64, 8, 24))))] == [16, 64, 8]


def test_a_text_that_is_longer_than_a_batch_is_one() -> None:
    run = SimpleNamespace(packed=True, batch_tokens=10)
    assert len(choose_batch(queue((run, 50), (run, 5)))) == 1


def test_few_texts_do_not_wait_for_all_of_a_large_request(served, expected) -> None:
    """A request of one text, after one of 360, is answered before it."""
    batcher, run, done = Batcher(1000, ServingMetrics()), served["run"], list[str]()

    async def ask(name: str, texts: list[str]) -> Any:
        found = await batcher.predict(run, texts)
        done.append(name)
        return found

    async def both() -> list[Any]:
        large = asyncio.create_task(ask("large", TEXTS * 6))
        while not batcher._queue:
            await asyncio.sleep(0.001)
        small = asyncio.create_task(ask("small", TEXTS[:1]))
        while len(batcher._queue) == 6 * len(TEXTS):
            await asyncio.sleep(0.001)
        batcher.start()
        return [await large, await small]

    large, small = asyncio.run(both())
    batcher.close()
    assert done == ["small", "large"]
    np.testing.assert_allclose(large.logits, np.tile(expected["run"].logits, (6, 1)), atol=1e-5)
    np.testing.assert_allclose(small.logits, expected["run"].logits[:1], atol=1e-5)


def test_several_threads_share_the_texts_and_each_request_gets_its_own(served, expected) -> None:
    batcher, names = Batcher(5000, ServingMetrics(), threads=3), ["three-labels", "several", "windows", "words"]

    async def ask_all() -> list[Any]:
        asked = [batcher.predict(served[name], TEXTS[i:]) for i in range(10) for name in names]
        return await asyncio.gather(*asked)

    batcher.start()
    assert batcher.alive
    answers = asyncio.run(ask_all())
    batcher.close()
    for at, answer in enumerate(answers):
        wanted = expected[names[at % len(names)]].logits[at // len(names) :]
        np.testing.assert_allclose(answer.logits, wanted, atol=1e-5)


def test_batches_are_computed_at_once_on_a_cpu(served: dict[str, ServedRun], monkeypatch) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(8)
        assert batch_threads([served["run"], served["windows"], served["words"]]) == 4
        assert torch.get_num_threads() == 2
        torch.set_num_threads(8)
        assert batch_threads([served["run"], served["packed"]]) == 1 and torch.get_num_threads() == 8
    finally:
        torch.set_num_threads(before)
    monkeypatch.setattr(served["run"].model, "quantization", Quantization(bits=8))
    assert not served["run"].concurrent


def test_runs_share_the_weights_that_are_equal_and_no_others(served: dict[str, ServedRun], run_folders) -> None:
    places = {
        name: {p.data_ptr() for key, p in run.model.named_parameters() if ".bert." in key and not p.requires_grad}
        for name, run in served.items()
    }
    assert places["three-labels"] == places["several"] == places["pairs"] and len(places["pairs"]) > 15
    trained = [
        {p.data_ptr() for p in served[name].model.parameters() if p.requires_grad}
        for name in ("several", "three-labels")
    ]
    assert not trained[0] & trained[1]
    assert served["run"].shared_bytes < served["pairs"].shared_bytes < served["pairs"].weight_bytes
    assert served["run"].loaded.tokenizer is served["several"].loaded.tokenizer
    # What other runs did meanwhile has changed nothing.
    alone = load_run(run_folders["three-labels"])
    others = served["three-labels"].model.parameters()
    for (name, one), other in zip(alone.model.named_parameters(), others, strict=True):
        assert torch.equal(one, other), name


def test_before_a_run_is_served_two_unlike_texts_are_predicted_as_all_will_be(run_folders, monkeypatch) -> None:
    """By two texts that are alike, packed batches would be checked in vain; and what is merged on a GPU is kept."""
    merged, lengths = list[bool](), list[list[int]]()
    begin, logits = module.begin_evaluation, module.TextClassifier.document_logits

    def recorded(model: Any, dtype: Any, speedups: Any, engine: Any) -> None:
        merged.append(speedups.merged_evaluation)
        begin(model, dtype, speedups, engine)

    def computed(self: Any, batch: Any) -> torch.Tensor:
        lengths.append(batch["attention_mask"].sum(1).tolist())
        return logits(self, batch)

    monkeypatch.setattr(module, "begin_evaluation", recorded)
    monkeypatch.setattr(module.TextClassifier, "document_logits", computed)
    for name in ("three-labels", "pairs"):
        ServedRun(run_folders[name], "best", SharedWeights(), merged=False)
    assert merged == [False] * 4 and len(lengths) == 2
    assert all(len({*several}) == len(several) == 2 for several in lengths)


def test_weights_of_other_types_or_shapes_are_not_shared() -> None:
    shared, layer = SharedWeights(), torch.nn.Linear(4, 4)
    assert shared.share(layer) == (80, 0)
    halves = torch.nn.Linear(4, 4).bfloat16()
    assert shared.share(halves) == (40, 0)
    again = torch.nn.Linear(4, 4)
    again.load_state_dict(layer.state_dict())
    with torch.no_grad():
        again.weight[0, 0] += 1
    assert shared.share(again) == (80, 16) and again.bias.data_ptr() == layer.bias.data_ptr()
    assert again.weight[0, 0].item() == pytest.approx(layer.weight[0, 0].item() + 1)
