"""Puts cntlora between PEFT's own tests and PEFT: a LoRA that a test makes is initialised before the test has it.

`get_peft_model`, `add_adapter` and `inject_adapter_in_model` call `cntlora.initialize` on what they made, with the
inputs of the test itself. What is loaded from a file is left alone, and so are configurations that ask for another
initialisation.

How a test's configuration is read:

- `init_lora_weights=True`: the base policy of the setting.
- `init_lora_weights=False` asks for an adapter that changes the output: base "keep", with a strength drawn from the
  test's random state, so that two adapters differ as two random ones do.
- The test's rank is that of the file. Base "offset" doubles the rank, so each site has half of it before, which leaves
  rank, alpha and scaling as the test has them. Rank 1 cannot be halved and ends as 2.
- A site that is smaller than the rank gets the largest rank that it can have, and the test's configuration says so.
"""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftMixedModel, PeftModel
from torch import nn

import cntlora
from cntlora.data.reading_mode import as_found
from cntlora.model.checks import usable_sites
from cntlora.model.lora_layers import factor_slots
from cntlora.model.sites import find_sites

WEIGHTS_ONLY = ("pissa", "olora", "lora")
"""Methods that read no data."""


@dataclass
class Session:
    """The present run: the setting, the test, and what became of the adapters that it made.

    Attributes:
        refusals: patterns of the messages by which cntlora may refuse an adapter; any other refusal fails the test.
        loading: how many calls that load from a file are under way.
        starts: an entry for each adapter: "ours", "partly ours" or "refused: …".
    """

    method: str
    base: str
    refusals: tuple[str, ...] = ()
    test: Any = None
    loading: int = 0
    starts: list[str] = field(default_factory=list)


def install(session: Session) -> None:
    """Replace PEFT's functions; before any test module is imported, since they import them by name."""
    import peft.mapping
    import peft.mapping_func

    made = functools.partial(_started, session)
    wrapped = made(peft.get_peft_model, model_at=0, config_at=1, name_at=2)
    peft.get_peft_model = peft.mapping_func.get_peft_model = wrapped
    injected = made(peft.inject_adapter_in_model, model_at=1, config_at=0, name_at=2)
    peft.inject_adapter_in_model = peft.mapping.inject_adapter_in_model = injected
    for kind in (PeftModel, PeftMixedModel):
        kind.add_adapter = made(kind.add_adapter, model_at=0, config_at=2, name_at=1)
        for name in ("from_pretrained", "load_adapter"):
            if name in vars(kind):
                setattr(kind, name, _loading(session, vars(kind)[name]))
    gc.collect()
    gc.freeze()


def _loading(session: Session, function: Any) -> Any:
    """A function that loads an adapter from a file: what it makes is not initialised."""
    inner = function.__func__ if isinstance(function, classmethod) else function

    @functools.wraps(inner)
    def load(*args: Any, **options: Any) -> Any:
        session.loading += 1
        try:
            return inner(*args, **options)
        finally:
            session.loading -= 1

    return classmethod(load) if isinstance(function, classmethod) else load


def _started(session: Session, function: Any, model_at: int, config_at: int, name_at: int) -> Any:
    """A function that makes an adapter, which initialises it besides."""
    signature = inspect.signature(function)
    model_name, config_name, adapter_name = (list(signature.parameters)[i] for i in (model_at, config_at, name_at))

    @functools.wraps(function)
    def make(*args: Any, **options: Any) -> Any:
        try:
            bound = signature.bind(*args, **options)
        except TypeError:
            return function(*args, **options)  # its own error
        bound.apply_defaults()
        config, adapter = bound.arguments[config_name], bound.arguments[adapter_name]
        if not _is_ours(session, config) or bound.arguments.get("state_dict") is not None:
            return function(*args, **options)
        asked, config.init_lora_weights = config.init_lora_weights, True
        try:
            result = function(*args, **options)
            model = bound.arguments[model_name] if result is None else result
            if any(p.device.type == "meta" for p in model.parameters()):
                session.starts.append("refused: weights on the meta device")
            elif _initialise(session, model, adapter, changes=asked is False):
                _tell(model, adapter, config)
        finally:
            config.init_lora_weights = asked
        for own in _configs(model, adapter):
            own.init_lora_weights = asked
        return result

    return make


def _configs(model: nn.Module, adapter: str) -> list[Any]:
    """The configurations of an adapter that a model holds."""
    held = [getattr(module, "peft_config", None) for module in model.modules()]
    return [configs[adapter] for configs in held if isinstance(configs, dict) and adapter in configs]


def _tell(model: nn.Module, adapter: str, config: LoraConfig) -> None:
    """Put the ranks that the sites have into the caller's configuration, as if the test had asked for them."""
    for own in _configs(model, adapter)[-1:]:
        for name in ("r", "lora_alpha", "rank_pattern", "alpha_pattern"):
            setattr(config, name, copy.copy(getattr(own, name)))


def _is_ours(session: Session, config: Any) -> bool:
    if type(config) is not LoraConfig or session.loading:
        return False
    return config.init_lora_weights in (True, False) and isinstance(config.init_lora_weights, bool)


def _initialise(session: Session, model: nn.Module, adapter: str, changes: bool) -> bool:
    """Call `cntlora.initialize` on the sites that it accepts; the others keep the start that the test asked for.

    Returns:
        Whether a site is too small for the rank that the test asked for.
    """
    config = _init_config(session, changes)
    batches, forward = (None, None) if session.method in WEIGHTS_ONLY else inputs(model, session.test)
    refusals: list[str] = []
    sites: list[Any] = []
    undo: list[Callable[[], None]] = []
    too_small = False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sites, tied, refused = usable_sites(model, find_sites(model, adapter), adapter, config, "warn")
        sites += [one.site for one in tied]
        refusals += [f"{name} cannot be initialised: {reason}" for name, reason in refused.items()]
        too_small = any(site.rank > min(site.in_features, site.out_features) for site in sites)
        undo += [_fitted(site, config.effective_base == "offset", even=session.base == "offset") for site in sites]
        if sites:
            with warnings.catch_warnings():
                if refused:
                    warnings.simplefilter("ignore")
                cntlora.initialize(
                    model, batches, config, forward=forward, adapter_name=adapter, progress=False,
                    on_missing="warn" if refused else "raise",
                )  # fmt: skip
    except Exception as error:  # of cntlora or of the model; what the list does not know fails the test below
        refusals.append(f"{type(error).__name__}: {' '.join(str(error).split())}")
        sites = []
        for put_back in undo:
            put_back()
    unknown = [text for text in refusals if not any(re.search(pattern, text) for pattern in session.refusals)]
    if unknown:
        raise AssertionError(f"cntlora refuses what it should not: {unknown[0]}")
    if changes and refusals:
        _randomise_fresh(model, adapter)
    reasons = f": {refusals[0]}" if refusals else ""
    session.starts.append((("partly ours" if refusals else "ours") if sites else "refused") + reasons)
    return too_small and bool(sites)


def _fitted(site: Any, doubles: bool, even: bool) -> Callable[[], None]:
    """Lower the rank of a fresh site to what leaves the file with the test's rank; return what undoes that.

    Args:
        doubles: the base policy doubles the rank.
        even: a rank that the site's size limits becomes even, so that it is the same whether the policy doubles or not.
    """
    layer, adapter, rank = site.layer, site.adapter, site.rank
    most = min(rank, site.in_features, site.out_features)
    if even and most < rank and most > 1:
        most -= most % 2
    wanted = max(1, most // 2) if doubles else most
    (a_owner, a_name), (b_owner, b_name) = factor_slots(layer, adapter)
    A, B, alpha = site.A, site.B, layer.lora_alpha[adapter]

    def put(first: nn.Parameter, second: nn.Parameter, size: int, scale: float) -> None:
        setattr(a_owner, a_name, first)
        setattr(b_owner, b_name, second)
        layer.r[adapter], layer.lora_alpha[adapter] = size, scale

    if wanted != rank:
        share = wanted / rank
        put(
            nn.Parameter(A.detach()[:wanted].clone(), requires_grad=A.requires_grad),
            nn.Parameter(B.detach()[:, :wanted].clone(), requires_grad=B.requires_grad),
            wanted,
            alpha * (share**0.5 if site.use_rslora else share),
        )
    return lambda: put(A, B, rank, alpha)


def _init_config(session: Session, changes: bool) -> Any:
    if not changes:
        return cntlora.InitConfig(method=session.method, base=session.base)
    return cntlora.InitConfig.from_dict(
        {"method": session.method, "base": "keep", "strength": 1 + torch.rand(()).item()}
    )


def _randomise_fresh(model: nn.Module, adapter: str) -> None:
    """Make the random start that the test asked for, at sites that were refused."""
    for module in model.modules():
        plain = getattr(getattr(module, "lora_B", None), "_modules", {}).get(adapter)
        if plain is not None and hasattr(plain, "reset_parameters") and not plain.weight.any():
            plain.reset_parameters()
        rows = getattr(module, "lora_embedding_A", {})
        if adapter in rows and not rows[adapter].any():
            nn.init.normal_(rows[adapter])


def inputs(model: nn.Module, test: Any) -> tuple[list[Any], Any]:
    """A batch for a model of a test, the test's own where the model takes it, and how to call the model with it."""
    inner = _inner(model)
    names = list(inspect.signature(inner.forward).parameters)
    instance = getattr(test, "instance", None)
    own = instance.prepare_inputs_for_testing() if hasattr(instance, "prepare_inputs_for_testing") else None
    if isinstance(own, dict) and set(own) <= set(names):
        return [own], None
    if names[0] == "sample":
        return [_latents()], lambda unet, batch: unet(**batch)
    if "img_ids" in names:
        return [_image_tokens()], lambda transformer, batch: transformer(**batch)
    if names[0] == "pixel_values":
        return [{"pixel_values": torch.rand(2, 3, 96, 96)}], None
    if "dummy_image_input" in names:  # the model of test_lora_variants.py
        return [{"input_ids": torch.arange(10).view(1, -1), "dummy_image_input": torch.rand(1, 1, 10, 10)}], None
    if "input_ids" in names:
        ids = torch.arange(10).view(1, -1)
        decoder = {"decoder_input_ids": ids} if "decoder_input_ids" in names else {}
        return [{"input_ids": ids, **decoder}], None
    return [_first_that_fits(inner, [*_fixture(inner, test), *_generic(inner)])], None


def _first_that_fits(model: nn.Module, batches: list[torch.Tensor]) -> torch.Tensor:
    """The first batch that the model can be called with; the first one if there is none."""
    for batch in batches if len(batches) > 1 else []:
        with as_found(model, []), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                model.eval()(batch)
            except Exception:  # a model may raise anything on an input that is not its own
                continue
        return batch
    return batches[0]


def _fixture(model: nn.Module, test: Any) -> list[torch.Tensor]:
    """The value of the fixture `data` of a test's class, whether this test asks for it or not."""
    if test is None:
        return []
    with as_found(model, []):  # the random state is the test's
        torch.manual_seed(0)
        try:
            data = test._request.getfixturevalue("data")
        except pytest.FixtureLookupError:
            return []
    return [data] if isinstance(data, torch.Tensor) else []


def _generic(model: nn.Module) -> list[torch.Tensor]:
    """Batches in the form that the first layer of a model takes."""
    X = torch.arange(90).view(9, 10)  # what most models of test_custom_models.py take, also those with convolutions
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    first = next((m for m in model.modules() if isinstance(m, kinds)), None)
    embedding = next((m for m in model.modules() if isinstance(m, nn.Embedding)), None)
    if embedding is not None:
        return [X % embedding.num_embeddings]
    if isinstance(first, nn.Linear):
        return [torch.arange(9.0 * first.in_features).view(9, first.in_features)]
    if first is None:
        return [X.float()]
    generator = torch.Generator().manual_seed(0)
    sizes = ([10] * len(first.kernel_size), first.kernel_size)
    return [X.float(), *(torch.rand(9, first.in_channels, *size, generator=generator) for size in sizes)]


def _inner(model: nn.Module) -> nn.Module:
    """The model inside PEFT's wrappers."""
    while isinstance(model, PeftModel | PeftMixedModel):
        model = model.base_model.model if hasattr(model.base_model, "model") else model.base_model
    return model


def _latents() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        "sample": torch.randn(2, 4, 32, 32, generator=generator),
        "timestep": torch.tensor([0, 0]),
        "encoder_hidden_states": torch.randn(2, 7, 32, generator=generator),
    }


def _image_tokens() -> dict[str, Any]:
    """Inputs of the small Flux transformer: 16 tokens of an image and 7 of a prompt."""
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(1, 16, 4, generator=generator),
        "encoder_hidden_states": torch.randn(1, 7, 16, generator=generator),
        "timestep": torch.tensor([1.0]),
        "guidance": torch.tensor([1.0]),
        "img_ids": torch.cartesian_prod(torch.arange(1), torch.arange(4), torch.arange(4), torch.arange(1))[None],
        "txt_ids": torch.cartesian_prod(torch.arange(1), torch.arange(1), torch.arange(1), torch.arange(7))[None],
    }
