"""A mask belongs to a stream of tokens: each layer counts the tokens of the stream that it sees, and no padding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from tests.cases import relative_error
from tests.stream_models import (
    ARCHITECTURES,
    IMAGE,
    Batch,
    adapted,
    cast,
    classified,
    one_at_a_time,
    text,
)
from tests.versions import before
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import cntlora
from cntlora import InitConfig, compute_plan
from cntlora.data.anatomy import Anatomy
from cntlora.data.collect import collect
from cntlora.data.padding import token_masks
from cntlora.data.streams import Streams
from cntlora.methods.facts import Facts
from cntlora.model.sites import find_sites
from cntlora.plan import InitPlan

LENGTHS = {kind: [8, 4, 4] if kind in ("longformer", "led") else [5, 3, 6] for kind in ARCHITECTURES}
"""Longformer's in multiples of its window of four, so that a row alone is not padded."""
SQUARE = {
    "xlnet": [6, 3, 6, 4, 2, 6],  # as many rows as tokens: the transpose has the same shape
    "longformer": [8, 4, 8, 4, 4, 8, 4, 8],
    "bert": [6, 3, 6, 4, 2, 6],
    "opt": [6, 3, 6, 4, 2, 6],
    "t5": [5, 3],  # 5 tokens for the encoder and 5 for the decoder
    "bart": [5, 3],
    "marian": [5, 3],
    "switch": [5, 3],
    "vision_encoder_decoder": [5, 3],  # 5 tokens and 5 patches
    "llava": [4, 2, 3],
    "qwen2_5_vl": [12, 5, 6],  # 3·16 tokens and 3·16 patches
}
CASES = [(kind, side, 0, LENGTHS[kind]) for kind, found in ARCHITECTURES.items() for side in found.sides]
CASES += [(kind, side, 5, LENGTHS[kind]) for kind, found in ARCHITECTURES.items() for side in found.sides]
CASES += [(kind, ARCHITECTURES[kind].sides[-1], 0, lengths) for kind, lengths in SQUARE.items()]
ROTARY = 1e-5
"""Rotations are computed in float32, 1e-7 a token at another place; all else is float64."""


def grams(model: nn.Module, batches: list[Batch], **options: Any) -> tuple[dict[str, Tensor], Facts]:
    """Σ X Xᵀ of every site over all batches."""
    found: dict[str, Tensor] = {}

    def add(_: int, groups: Any) -> None:
        for names, X in groups:
            for name in names:
                found[name] = found.get(name, 0) + X.gram_sum()

    return found, collect(model, find_sites(model)[0], [cast(batch) for batch in batches], add, **options)


def is_masked(kind: str, site: str) -> bool:
    return ARCHITECTURES[kind].stream(site) not in ("pixel_values", "input_features")


def skip_if_it_overflows(kind: str) -> None:
    """Skip where masks of float32 are filled with the least number of float64, as for these kinds in transformers 4."""
    if kind in ("led", "nllb_moe", "speech_to_text") and before("transformers", "5"):
        pytest.skip(f"the masks of {kind} in transformers 4 overflow where the model is in float64")


@pytest.mark.parametrize(("kind", "side", "extra", "lengths"), CASES)
def test_layers_count_the_tokens_that_the_rows_have_alone(kind: str, side: str, extra: int, lengths: list[int]) -> None:
    """A batch with padding gives the sums over its rows, each fed alone and without padding."""
    skip_if_it_overflows(kind)
    model = adapted(kind)
    alone, _ = grams(model, one_at_a_time(kind, lengths), token_mask="none", num_batches=len(lengths))
    batch = ARCHITECTURES[kind].batch(lengths, side, extra)
    together, facts = grams(model, [batch])
    assert alone.keys() == together.keys()
    for name, expected in alone.items():
        assert relative_error(together[name], expected) < ROTARY, (name, facts[name].masks)
        masks = [mask.split(" (")[0] for mask in facts[name].masks]
        assert masks == ([ARCHITECTURES[kind].stream(name)] if is_masked(kind, name) else []), name
    blind, _ = grams(model, [batch], token_mask="none")  # the control: padding would count
    errors = [relative_error(blind[name], alone[name]) for name in alone if is_masked(kind, name)]
    assert max(errors) > 0.01


@pytest.mark.filterwarnings("ignore:.*left as plain LoRA")  # experts that no token, or no loss, comes to
@pytest.mark.parametrize("method", ["self", "descent"])
@pytest.mark.parametrize(
    ("kind", "side"), [(kind, side) for kind, found in ARCHITECTURES.items() for side in found.sides]
)
def test_padding_changes_nothing(kind: str, side: str, method: str) -> None:
    """More of it gives the same plan; where all tokens count, another."""
    skip_if_it_overflows(kind)
    if (kind, method) == ("switch", "descent") and before("transformers", "5"):
        pytest.skip("the loss of Switch in transformers 4 adds the losses of its routers, which count padding")
    options = {"rtol": 1e-4} if method == "self" else {"strength": 0.1}
    config = InitConfig.from_dict({"method": method, "base": "keep", **options})  # type: ignore[arg-type]
    dtype = torch.float32 if kind in ("longformer", "led") else torch.float64  # whose float64 gradient is NaN
    model = adapted(kind, dtype=dtype)

    def plan(extra: int, rule: Any = None) -> InitPlan:
        batch = cast(ARCHITECTURES[kind].batch(LENGTHS[kind], side, extra), dtype)
        return compute_plan(model, [batch], config, token_mask=rule, on_missing="warn", progress=False)

    one, two = plan(0), plan(5)
    assert one.sites.keys() == two.sites.keys() and len(one.sites) > 2
    assert max(distances(one, two).values()) < 1e-3
    assert {name: s.tokens for name, s in one.sites.items()} == {name: s.tokens for name, s in two.sites.items()}
    blind = distances(plan(0, "none"), plan(5, "none"))  # the control
    assert max(blind.values()) > 0.02


def distances(one: InitPlan, other: InitPlan) -> dict[str, float]:
    """Distances of B·A at each site that both have."""
    both = one.sites.keys() & other.sites.keys()
    return {
        name: relative_error(other.sites[name].B @ other.sites[name].A, one.sites[name].B @ one.sites[name].A)
        for name in both
    }


# --- tokens that the loss does not reach --------------------------------------------------------------------


def classifier(kind: str) -> nn.Module:
    """BERT or Llama with another head: labels of rows, of tokens, or hidden words."""
    plain = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "pad_token_id": 0}
    cls, config = {
        "rows": (hf.BertForSequenceClassification, hf.BertConfig),
        "words": (hf.BertForMaskedLM, hf.BertConfig),
        "tokens": (hf.LlamaForTokenClassification, hf.LlamaConfig),
    }[kind]
    torch.manual_seed(0)
    return cls(config(**plain, intermediate_size=24, num_labels=40)).double().eval()


def one_in(labels: Tensor, *places: tuple[int, int]) -> Tensor:
    """Labels of these places only."""
    left = torch.full_like(labels, -100)
    for place in places:
        left[place] = labels[place]
    return left


def reached_cases() -> dict[str, tuple[Any, Batch]]:
    def made(kind: str) -> nn.Module:
        torch.manual_seed(0)
        return ARCHITECTURES[kind].make().double().eval()

    cases: dict[str, tuple[Any, Batch]] = {}
    for kind, side in (("llama", "right"), ("gpt2", "right"), ("opt", "left"), ("qwen2_5_vl", "right")):
        batch = cast(ARCHITECTURES[kind].batch([5, 3, 6], side, 2))
        cases[kind] = (lambda kind=kind: made(kind), batch)
        first, last = (int(i) for i in (batch["labels"][0] != -100).nonzero()[[0, -1], 0])
        prompt = one_in(batch["labels"], (0, last), (2, first + 1))  # the middle row has none, and no row all
        cases[f"{kind} after a prompt"] = (lambda kind=kind: made(kind), {**batch, "labels": prompt})
    for kind in ("bert", "xlnet"):
        batch = cast(ARCHITECTURES[kind].batch([5, 3, 6]))
        labels = one_in(batch["labels"], (0, 2), (2, 4))
        cases[kind] = (lambda kind=kind: made(kind), {**batch, "labels": labels})
    for kind in ("t5", "bart", "whisper"):
        batch = cast(ARCHITECTURES[kind].batch([5, 3, 6], "right", 2))
        cases[kind] = (lambda kind=kind: made(kind), batch)
        labels = one_in(batch["labels"], (0, 1), (2, 2))  # in the middle of the row, which is no padding
        cases[f"{kind} in the middle"] = (lambda kind=kind: made(kind), {**batch, "labels": labels})
    whole = text([5, 3, 6])
    cases["rows"] = (lambda: classifier("rows"), {**whole, "labels": torch.tensor([1, -100, 2])})
    cases["words"] = (lambda: classifier("words"), {**whole, "labels": one_in(whole["labels"], (0, 2), (0, 3))})
    cases["tokens"] = (lambda: classifier("tokens"), {**whole, "labels": one_in(whole["labels"], (0, 2), (2, 5))})
    return cases


REACHED = reached_cases()


WORDS = ("embed_tokens", "word_embeddings", "word_embedding", "wte", "shared")


def gradients_at_embeddings(model: Any, batch: Batch) -> list[Tensor]:
    """Gradients of the loss by what each call of a word embedding gives, (batch, tokens): whether it is not zero."""
    outputs: list[Tensor] = []
    kinds = {id(m): m for name, m in model.named_modules() if isinstance(m, nn.Embedding) and name.endswith(WORDS)}
    handles = [
        module.register_forward_hook(lambda m, args, out: (out.retain_grad(), outputs.append(out))[0])
        for module in kinds.values()
    ]
    model(**batch).loss.backward()
    for handle in handles:
        handle.remove()
    return [out.grad.abs().sum(dim=-1) > 0 for out in outputs if out.grad is not None]


@pytest.mark.parametrize("case", REACHED)
def test_tokens_that_the_loss_does_not_reach_are_those_without_a_gradient(case: str) -> None:
    """Labels and autograd say the same, at the embeddings of every stream."""
    make, batch = REACHED[case]
    model = make()
    masks = token_masks(Anatomy(model), batch, None, by_loss=True)
    streams = (
        ["decoder"]
        if "input_features" in batch
        else ["text", "decoder"]
        if model.config.is_encoder_decoder
        else ["text"]
    )
    found = gradients_at_embeddings(model, batch)
    assert len(found) == len(streams)
    found = [gradient.mT if case == "xlnet" else gradient for gradient in found]
    for stream, by_autograd in zip(streams, found, strict=True):
        rows = Streams(Anatomy(model), batch, masks).streams[stream]
        assert rows.keep is not None and ("loss" in rows.why or batch["labels"].ne(-100).any(-1).all())
        # what is scattered over the embeddings of an image's places leaves them without a gradient
        words = batch["input_ids"] != IMAGE if "pixel_values" in batch else torch.ones_like(rows.keep)
        assert torch.equal(rows.keep[words], by_autograd[words]), stream
        assert not rows.keep[words].all()
    plain = token_masks(Anatomy(model), batch, None)  # the control: the masks alone say another thing
    differs = [not torch.equal(plain.streams[s][0], gradient) for s, gradient in zip(streams, found, strict=True)]
    assert any(differs) or case in ("t5", "bart", "whisper")  # where labels are at the end of every row


# --- the decoder without a mask ------------------------------------------------------------------------------


def counted(model: Any, batch: Batch, rule: Any = None) -> dict[str, tuple[int, str, str]]:
    """Return for every site its tokens, its mask, and why it has none."""
    plan = compute_plan(model, [cast(batch)], InitConfig(method="self", base="keep"), token_mask=rule, progress=False)
    return {name: (site.tokens, site.mask, site.unmasked) for name, site in plan.sites.items()}


def of(found: dict[str, tuple[int, str, str]], part: str) -> set[tuple[int, str, str]]:
    """The facts of the sites with a part in their names."""
    return {facts for name, facts in found.items() if part in name}


ANSWERS = torch.tensor([[5, 6, 7, 2, -100], [8, 9, 2, -100, -100], [4, 5, 6, 7, 2]])


@pytest.mark.parametrize(
    ("change", "decoder"),
    [
        ({"labels": ANSWERS}, (12, "decoder (labels)")),
        ({"labels": ANSWERS.clamp_min(0)}, (12, "decoder (labels)")),  # padded with the padding token
        ({"labels": ANSWERS[:, :3].contiguous()}, (9, "decoder (labels)")),
        ({"decoder_input_ids": ANSWERS.roll(1, 1).clamp_min(0)}, (14, "decoder (padding ids)")),
        ({"decoder_input_ids": ANSWERS.clamp_min(1), "decoder_attention_mask": (ANSWERS > 4).long()},
         (8, "decoder (decoder_attention_mask)")),
        ({"labels": ANSWERS, "decoder_attention_mask": (ANSWERS > 4).long()}, (8, "decoder (decoder_attention_mask)")),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["t5", "bart", "marian"])
def test_the_decoder_counts_its_own_tokens(kind: str, change: dict[str, Tensor], decoder: tuple[int, str]) -> None:
    """By its mask, its labels, or its ids; the encoder, whose mask has the same shape, by its own."""
    if kind == "t5" and "decoder_attention_mask" in change and before("transformers", "5"):
        pytest.skip("T5 in transformers 4 adds two masks, so that a row whose first tokens are hidden gives NaN")
    batch = {**text([5, 3, 4]), **change}
    batch.update(change) if "labels" in change else batch.pop("labels")
    found = counted(adapted(kind), batch)
    names = (
        ("EncDecAttention.k", "DenseReluDense.wi") if kind == "t5" else ("encoder_attn.k_proj", "decoder.layers.0.fc1")
    )
    assert of(found, names[0]) == {(12, "text (attention_mask)", "")}
    assert (*decoder, "") in of(found, names[1])


def test_a_last_label_that_is_the_padding_token_may_be_the_end_of_the_text() -> None:
    """If both are one token, the first of the run that ends a row counts."""
    model = adapted("bart")
    model.get_base_model().config.eos_token_id = 0
    labels = torch.tensor([[5, 6, 0, 0, 0], [7, 8, 9, 5, 0]])
    found = counted(model, {**text([5, 3]), "labels": labels})
    assert of(found, "decoder.layers.0.self_attn.q_proj") == {(3 + 5, "decoder (labels)", "")}


# --- what the user says --------------------------------------------------------------------------------------


def test_one_mask_of_the_user_is_for_the_text_and_the_decoder_keeps_its_own() -> None:
    batch = ARCHITECTURES["t5"].batch([5, 3])  # five tokens on both sides
    first = torch.zeros(2, 5, dtype=torch.long)
    first[:, :2] = 1
    found = counted(adapted("t5"), batch, lambda _: first)
    assert of(found, "encoder") == {(4, "text (token_mask)", "")}
    assert of(found, "decoder.block.0.layer.0") == {(8, "decoder (labels)", "")}
    narrow = counted(adapted("t5"), ARCHITECTURES["t5"].batch([4, 3]), lambda _: first)  # only the decoder is so long
    assert of(narrow, "decoder.block.0.layer.0") == {(4, "decoder (token_mask)", "")}
    assert of(narrow, "encoder") == {(7, "text (attention_mask)", "")}


def test_masks_can_be_given_by_stream_and_by_site() -> None:
    batch = ARCHITECTURES["bart"].batch([5, 3])
    some = torch.tensor([[1, 0, 0, 0, 0], [0, 1, 1, 0, 0]])
    one, site = torch.tensor([[1, 0, 0, 0, 0], [0, 0, 0, 0, 0]]), "model.decoder.layers.0.fc1"
    model = adapted("bart")
    found = counted(model, batch, lambda _: {"decoder": some, site: one, "model.encoder.layers.0.fc2": None})
    assert found[site] == (1, "decoder (token_mask of the site)", "")
    assert found["model.decoder.layers.0.fc2"] == (3, "decoder (token_mask)", "")
    assert found["model.encoder.layers.0.fc2"] == (10, "", "")
    assert found["model.encoder.layers.0.fc1"] == (8, "text (attention_mask)", "")
    with pytest.raises(ValueError, match=r"for streams \('text', .*\) or sites, got one for 'model.decoder.fc9'"):
        counted(model, batch, lambda _: {"model.decoder.fc9": one})
    with pytest.raises(ValueError, match=rf"site {site}: token_mask gave it a mask \(2, 3\), .* of shape \(2, 5\)"):
        counted(model, batch, lambda _: {site: one[:, :3]})
    with pytest.raises(ValueError, match=r"a mask for 'model.decoder.layers.0.fc1', got list"):
        counted(model, batch, lambda _: {site: [1]})


def test_patches_can_be_given() -> None:
    """By the key of the batch that they come in by; a mask of the text is not for them, even of their shape."""
    batch = ARCHITECTURES["qwen2_5_vl"].batch([12, 5, 6])
    some = torch.arange(48) < 10
    found = counted(adapted("qwen2_5_vl"), batch, lambda _: {"pixel_values": some})
    assert of(found, "visual.blocks") == {(10, "pixel_values (token_mask)", "")}
    assert of(found, "language_model") == {(12 + 5 + 6 + 3 * 4, "text (attention_mask)", "")}
    batch = ARCHITECTURES["llava"].batch([1, 1, 1])  # five tokens a row, and four patches and one more
    found = counted(adapted("llava"), batch, lambda b: torch.ones_like(b["input_ids"]))
    assert of(found, "language_model") == {(15, "text (token_mask)", "")}
    assert {facts[:2] for facts in of(found, "vision_tower")} == {(15, "")}


def test_frames_can_be_given() -> None:
    batch = ARCHITECTURES["wav2vec2"].batch([5, 3, 6])
    frames = torch.zeros(3, 5, dtype=torch.long)
    frames[:, :2] = 1
    model = adapted("wav2vec2")
    assert set(counted(model, batch).values()) == {(11, "frames (attention_mask)", "")}
    for rule in (lambda _: {"frames": frames}, lambda _: frames):
        assert set(counted(model, batch, rule).values()) == {(6, "frames (token_mask)", "")}
    del batch["attention_mask"]  # group-normalised models are called without one
    assert set(counted(model, batch, lambda _: {"frames": frames}).values()) == {(6, "frames (token_mask)", "")}
    assert set(counted(model, batch).values()) == {(15, "", "")}


# --- what is said --------------------------------------------------------------------------------------------


def report_of(kind: str, batch: Batch, **options: Any) -> cntlora.InitReport:
    call = {"config": cntlora.InitConfig(method="self"), **options}
    return cntlora.initialize(adapted(kind), [cast(batch)], progress=False, **call)


def test_the_report_names_the_mask_of_every_site_and_why_one_has_none() -> None:
    batch = ARCHITECTURES["qwen2_5_vl"].batch([12, 5, 6])
    report = report_of("qwen2_5_vl", batch)
    sites, printed = report.to_dict()["sites"], str(report)
    for name, site in sites.items():
        seen = "visual" in name
        assert site["masked"] == (not seen) and bool(site["unmasked"]) == seen
        assert site["mask"] == ("" if seen else "text (attention_mask)")
    assert "† every token counts at 5 sites (model.visual.blocks.0" in printed
    assert "the batch has no mask of the shape of pixel_values" in printed
    assert "text (attention_mask)" in printed and "–†" in printed
    quiet = str(report_of("qwen2_5_vl", batch, token_mask="none"))  # none was wanted
    assert "†" not in quiet and "mask" not in quiet


@pytest.mark.parametrize("shape", [(3, 1, 6, 6), (3, 4)])
def test_a_mask_that_fits_nothing_is_said(shape: tuple[int, ...]) -> None:
    if len(shape) > 3 and before("transformers", "5"):
        pytest.skip("BERT in transformers 4 refuses a mask of four dimensions itself")
    batch = ARCHITECTURES["bert"].batch([6, 3, 4])
    report = report_of(
        "bert",
        {**batch, "attention_mask": torch.ones(shape)} if len(shape) > 2 else batch,
        **({} if len(shape) > 2 else {"token_mask": lambda _: torch.ones(shape)}),
    )
    assert not any(site["masked"] for site in report.sites.values())
    reason = "attention_mask has 4 dimensions" if len(shape) > 2 else "no mask of the shape of input_ids"
    assert all(reason in site["unmasked"] for site in report.sites.values()) and reason in str(report)


def test_rows_that_cannot_be_traced_are_counted_and_said() -> None:
    """A layer that sees every second token, mixed with its neighbour: no row of it is a token."""

    class Pooling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, hidden_states: Tensor) -> Tensor:
            x = self.inner(hidden_states)
            return self.outer(x[:, ::2] + x[:, 1::2])

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = Pooling()

        def forward(self, features: Tensor, attention_mask: Tensor) -> Tensor:
            return self.body(features)

    model = get_peft_model(Model(), LoraConfig(r=2, target_modules=["inner", "outer"]))
    batch = {
        "features": torch.randn(3, 6, 4),
        "attention_mask": (torch.arange(6) < torch.tensor([[6], [3], [2]])).long(),
    }
    plan = compute_plan(model, [batch], InitConfig(method="self", base="keep"), progress=False)
    assert (plan.sites["body.inner"].tokens, plan.sites["body.inner"].mask) == (11, "text (attention_mask)")
    outer = plan.sites["body.outer"]
    assert (outer.tokens, outer.mask) == (9, "") and "its 3×3 rows could not be traced to the tokens" in outer.unmasked


def tokens_of(report: cntlora.InitReport) -> int:
    (found,) = {site["tokens"] for site in report.sites.values()}
    return int(found)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_trainers_loss_leaves_out_what_the_models_own_does(tmp_path: Path, smoothing: float) -> None:
    """With a loss of another kind the masks alone decide, as with `loss=`."""
    config = InitConfig.from_dict({"method": "descent", "strength": 0.1, "num_batches": 1})
    rows = [{key: value[i] for key, value in text([6, 6, 6]).items()} for i in range(3)]
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    reached, masked = 3 * 5, 3 * 6  # not the last token of a row
    arguments = hf.TrainingArguments(
        str(tmp_path), per_device_train_batch_size=3, label_smoothing_factor=smoothing, use_cpu=True, report_to=[]
    )
    model = adapted("llama", dtype=torch.float32)
    trainer = hf.Trainer(model, arguments, train_dataset=rows)  # type: ignore[arg-type]
    report = cntlora.initialize_from_trainer(trainer, config)
    assert tokens_of(report) == (reached if smoothing == 0 else masked)
    for loss, expected in ((None, reached), (lambda m, b: m(**b).loss, masked)):
        model = adapted("llama", dtype=torch.float32)
        report = cntlora.initialize(model, [batch], config, loss=loss, progress=False)
        assert tokens_of(report) == expected


# --- what it costs -------------------------------------------------------------------------------------------


class Waits(TorchDispatchMode):
    """Counts the operations that wait for a GPU, and would do so here."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.count += name in ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select")
        return func(*args, **(kwargs or {}))


def layered(kind: str, layers: int) -> Any:
    plain = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": layers, "num_attention_heads": 2}
    targets = ["q_proj", "k_proj", "fc1", "fc2", "down_proj", "q", "k", "wi", "wo"]
    base = {
        "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**plain, intermediate_size=24)),
        "opt": lambda: hf.OPTForCausalLM(hf.OPTConfig(**plain, ffn_dim=24, word_embed_proj_dim=16)),
        "t5": lambda: hf.T5ForConditionalGeneration(
            hf.T5Config(
                vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_heads=2, num_layers=layers, decoder_start_token_id=0
            )
        ),
    }[kind]()
    return get_peft_model(base.eval(), LoraConfig(r=2, target_modules=targets))


@pytest.mark.parametrize(
    ("kind", "method", "left_out", "followed"),
    [
        ("bert", "self", ("attention_mask",), False),
        ("rows", "descent", ("attention_mask",), False),
        ("whisper", "self", ("labels",), False),
        ("bert", "self", (), True),
        ("whisper", "self", (), True),  # labels of a decoder that are padded
        ("llama", "descent", ("attention_mask",), True),  # the last tokens
    ],
)
def test_calls_are_followed_only_where_a_token_may_not_count(
    kind: str, method: str, left_out: tuple[str, ...], followed: bool
) -> None:
    """Else there is one hook a site, as ever, so that such batches cost nothing more."""
    model = (
        get_peft_model(classifier(kind), LoraConfig(r=2, target_modules=["query"])) if kind == "rows" else adapted(kind)
    )
    whole = classified([5, 3, 6]) if kind == "rows" else ARCHITECTURES[kind].batch([5, 3, 6])
    batch = cast({key: value for key, value in whole.items() if key not in left_out})
    if kind == "whisper" and "labels" in left_out:
        batch["decoder_inputs_embeds"] = torch.randn(3, 4, 16).double()
    counts: list[int] = []

    def forward(model: nn.Module, batch: Batch) -> Any:
        counts.append(sum(len(m._forward_pre_hooks) for m in model.modules()))
        return model(**batch)

    compute_plan(model, [batch], InitConfig(method=method, base="keep"), forward=forward, progress=False)
    sites = len(find_sites(model)[0])
    assert (counts[0] > sites) == followed and counts[0] >= sites


@pytest.mark.parametrize("kind", ["llama", "opt", "t5"])
def test_masks_do_not_wait_for_a_gpu_at_every_layer(kind: str) -> None:
    """With and without masks, as many more operations that wait for two layers as for four."""
    batch = ARCHITECTURES[kind].batch([5, 3, 6])
    more = []
    for layers in (2, 4):
        model, counts = layered(kind, layers), []
        for rule in (None, "none"):
            with Waits() as waits:
                collect(model, find_sites(model)[0], [batch], lambda *_: None, token_mask=rule, inputs=False)
            counts.append(waits.count)
        more.append(counts[0] - counts[1])
    assert more[0] == more[1] > 0
    with Waits() as waits:  # the control
        for _ in range(3):
            bool(torch.ones(1).any())
    assert waits.count == 3
