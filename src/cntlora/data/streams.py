"""The stream of tokens that a layer sees: follows the calls of a model's modules during one forward pass.

A mask belongs to a stream of tokens (the text, the decoder's tokens, frames of sound), not to a shape: a decoder may be
as long as its encoder, and an image have as many patches as a text has tokens. So a tensor is known by where it comes
from. The batch's own tensors begin the streams; what a module returns for them, in the same leading shape, is of the
same stream; a tensor that a module makes inside is of the stream of its input. Tensors are recognised by identity and
by the memory they look at, ids that were padded or transposed by their values, and rows that a router picked by their
bits.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from .calls import ASIDE, Call, call_inside, counted_by, main_of, own_mask, picks_rows, returned_by, tensors_of
from .rows import Rows, found_by_value, is_flat, lead_of, same_ids, seen_as_view

if TYPE_CHECKING:
    from .anatomy import Anatomy
    from .padding import TokenMasks


class Streams:
    """Tells for the inputs of one forward pass which of their rows count.

    Args:
        model: what is known of it.
        batch: on the device of the model.
        masks: what is known of the batch's tokens.
    """

    def __init__(self, model: Anatomy, batch: Any, masks: TokenMasks) -> None:
        self.masks = masks
        self.calls: list[Call] = []
        self.tags: Any = WeakIdKeyDictionary()  # tensor → its rows
        self.memory: dict[int, Any] = {}  # address of a storage → weak reference to a tensor with rows in it
        self.ids: list[tuple[Tensor, Rows]] = []  # known ids, and which count
        self.keys: list[tuple[Tensor, Rows]] = []  # masks of the batch, and the rows of their stream
        self.unmasked: dict[torch.Size, tuple[torch.dtype, Rows]] = {}  # of the batch's tensors that have no mask
        self.decoder = model.decoder
        self.streams = {name: self._stream(name) for name in masks.streams}
        self.placed = False  # whether the text of the batch has been found
        self._note_batch(batch)
        self.frames = self._frames(model)

    # --- what the batch says ---------------------------------------------------------------------------------

    def _stream(self, name: str) -> Rows:
        """The rows of a stream in its own grid, as the masks have it."""
        mask, why = self.masks.streams[name]
        reached = self.masks.reached.get(name)
        if reached is not None and reached.shape == mask.shape:
            # labels themselves say less than what they reach
            return Rows(name, reached if why == "labels" else mask & reached, f"{why}, loss")
        return Rows(name, mask, why)

    def without(self, name: str, reason: str, lead: torch.Size | None = None) -> Rows:
        """The rows of a stream of which no mask is known; the loss may tell them, if they have the shape `lead`."""
        reached = self.masks.reached.get(name)
        if reached is not None and reached.shape == lead:
            mask, why = self.masks.streams.get(name, (reached, ""))
            if why == "token_mask" and mask.shape != lead:
                raise ValueError(
                    f"token_mask: expected a mask of shape {tuple(lead)}, that of the tokens of {name!r}, got "
                    f"{tuple(mask.shape)}; return one of that shape, or None to let all tokens count"
                )
            return Rows(name, reached, "loss")
        return Rows(name, None, (self.masks.unusable or reason) if self.masks.given else "")

    def _note_batch(self, batch: Any) -> None:
        if not isinstance(batch, Mapping):
            return
        for key, value in batch.items():
            if isinstance(value, Tensor):
                self._note_tensor(str(key), value)

    def _note_tensor(self, key: str, value: Tensor) -> None:
        if "label" in key:
            return
        if "mask" in key:
            stream = self.masks.stream_of(key)
            if stream in self.streams:
                self.keys.append((value, self.streams[stream]))
            return
        name = "decoder" if key.startswith("decoder_") else "encoder" if key.startswith("encoder_") else "text"
        if name == "text" and key.startswith(("pixel", "image", "video")):
            name = key
        ids, lead = key.endswith("input_ids"), lead_of(value)
        own = ids or key.endswith("inputs_embeds")  # the words of the stream, and not something beside them
        rows = self.streams.get(name)
        if key == "decoder_input_ids" and rows is None and self.masks.pad_id is not None:
            rows = self._by_ids(value)
        if rows is None or rows.lead != lead:
            if not (ids or value.is_floating_point()):
                return
            rows = self.without(name if own else key, f"the batch has no mask of the shape of {key}", lead)
            self.unmasked[value.shape] = (value.dtype, rows)
        self.placed = self.placed or rows is self.streams.get("text")
        self.tag(value, rows)
        if ids:
            self.ids.append((value, rows))

    def _by_ids(self, ids: Tensor) -> Rows:
        """The decoder's tokens by its ids; the first counts, since decoders often begin with the padding token."""
        keep = torch.ne(ids, self.masks.pad_id or 0)
        keep[:, 0] = True
        reached = self.masks.reached.get("decoder")
        return Rows("decoder", keep if reached is None or reached.shape != keep.shape else reached, "padding ids")

    def _frames(self, model: Anatomy) -> dict[torch.Size, Rows]:
        """Leading shape → the frames that count, of models that make them from the samples or frames of the batch."""
        text = self.masks.streams.get("text")
        if text is None or model.maker_of_frames is None or text[0].shape[1] == 0:
            return {}
        mask, reached = text[0], self.masks.reached.get("text")
        made: dict[torch.Size, Rows] = {}
        mask_of, length_of = model.frame_methods
        for options in model.frame_options:
            size = int(length_of(torch.tensor(mask.shape[1]), **options))
            lead = torch.Size([mask.shape[0], size])
            if size > 0 and lead != mask.shape and lead not in made:
                keep, why = mask_of(size, mask.long(), **options).bool(), text[1]
                if reached is not None:
                    keep, why = keep & reached.any(dim=1, keepdim=True), f"{why}, loss"
                made[lead] = self._given("frames", lead) or Rows("frames", keep, why)
        return made

    def _given(self, name: str, lead: torch.Size) -> Rows | None:
        """The user's mask of a stream that only the model makes, or the user's one mask if it has that shape."""
        for stream in (name,) if self.placed else (name, "text"):  # one mask of the user is first taken for the text's
            rows = self.streams.get(stream)
            if rows is not None and rows.lead == lead and rows.why.startswith("token_mask"):
                return Rows(name, rows.keep, rows.why)
        return None

    # --- tags ------------------------------------------------------------------------------------------------

    def tag(self, x: Tensor, rows: Rows) -> None:
        """Note the rows of a tensor."""
        self.tags[x] = rows
        if (address := _address(x)) != 0:
            self.memory[address] = weakref.ref(x)

    def known(self, x: Tensor) -> Rows | None:
        """The rows of a tensor that is tagged, or looks at the memory of one that is."""
        return self._known(x, self.tags.get(x))

    def _known(self, x: Tensor, rows: Rows | None) -> Rows | None:
        if rows is None:
            base = self.memory.get(_address(x), _nothing)()
            found = self.tags.get(base) if base is not None else None
            rows = None if found is None or base is None else seen_as_view(x, base, found)
        if rows is not None and rows.keep is None and rows.stream.startswith("input_"):
            return self.frames.get(lead_of(x), rows)
        return rows

    # --- the calls -------------------------------------------------------------------------------------------

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A module begins."""
        arguments = tensors_of(module, args, kwargs)
        name, main = main_of(arguments)
        around = self.calls[-1] if self.calls else None
        if main is None:
            self.calls.append(call_inside(around, module))
            return
        self._tag_states(arguments)
        tagged = self.tags.get(main)
        rows = self._rows_of(module, name, main, arguments, tagged)
        if rows is not None and rows is not tagged:
            self.tag(main, rows)
        others = [
            (lead_of(x), found)
            for key, x in arguments.items()
            if x is not main and not any(part in key for part in ASIDE) and (found := self.tags.get(x)) is not None
        ]
        width = main.shape[-1] if main.is_floating_point() else None
        self.calls.append(Call(module, weakref.ref(main), lead_of(main), width, rows, picks_rows(module), others))

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """A module ends: what it returns in the leading shape of its input is of the stream of that."""
        call = None
        while self.calls and (call is None or call.module is not module):
            call = self.calls.pop()
        if call is None or call.rows is None:
            return
        around = self.calls[-1] if self.calls else None
        for x in returned_by(output):
            rows = self.tags.get(x)
            if rows is None and (rows := call.returns(x, lead_of(x))) is not None:
                self.tag(x, rows)
            if rows is not None and around is not None:
                around.made[lead_of(x)] = rows
        if around is not None:
            around.last = call.rows

    def _tag_states(self, arguments: dict[str, Tensor]) -> None:
        """The states that a decoder is handed, where they are not known yet: by their mask, or by what made them."""
        states, mask = arguments.get("encoder_hidden_states"), arguments.get("encoder_attention_mask")
        if states is None or states.dim() < 2 or self.known(states) is not None:
            return
        lead, around = lead_of(states), self.calls[-1] if self.calls else None
        if mask is not None and mask.shape == lead:
            self.tag(states, self._of_mask("encoder", mask))
        elif around is not None and lead in around.made:
            self.tag(states, around.made[lead])
        else:
            self.tag(states, self.without("encoder", "it is not known which tokens the encoder's states are of"))

    def _rows_of(
        self, module: nn.Module, name: str, main: Tensor, arguments: dict[str, Tensor], tagged: Rows | None
    ) -> Rows | None:
        """Return the rows of a module's main input that count."""
        own = own_mask(arguments, lead_of(main))
        if module is self.decoder:
            return self._decoder_rows(main, own)
        rows = self._known(main, tagged)
        if rows is None and not main.is_floating_point():
            rows = self._by_value(module, name, main)
            if rows is None and name == "input_ids" and self.ids:  # not those of the batch: cut, or put together anew
                return self._of_mask("text", own) if own is not None else self.without("text?", "its ids are new ones")
        if rows is None and own is not None:
            rows = next((rows for mask, rows in self.keys if mask is own and rows.lead == lead_of(main)), None)
        if rows is None:
            rows = self.inside(main, search=False)
        if own is not None and (rows is None or (rows.keep is None and rows.stream not in self.streams)):
            sound = rows is not None and rows.stream.startswith("input_")
            rows = self._of_mask("frames" if sound else type(module).__name__, own)
        return rows

    def _of_mask(self, name: str, mask: Tensor) -> Rows:
        """The rows that a module is called with a mask of its own for: a stream that begins there, or a padded one."""
        given, keep = self._given(name, mask.shape), counted_by(mask)
        if given is not None:
            return given
        for known, rows in self.keys:
            more = mask.shape[1] - known.shape[-1]
            longer = rows.lead == known.shape and len(known) == len(mask) and more > 0
            if longer and torch.equal(F.pad(known.bool(), (0, more)), keep):
                return rows.padded(more)
        return Rows(name, keep, "attention_mask")

    def _decoder_rows(self, main: Tensor, own: Tensor | None) -> Rows:
        rows, lead = self.streams.get("decoder"), lead_of(main)
        if rows is not None and rows.lead == lead:
            return rows
        rows = self.tags.get(main)
        if rows is not None and rows.stream == "decoder":
            return rows
        if own is not None:
            return self._of_mask("decoder", own)
        if not main.is_floating_point() and self.masks.pad_id is not None and main.dim() == 2:
            return self._by_ids(main)
        return self.without("decoder", f"there is no mask and no labels of the decoder's {tuple(lead)} tokens", lead)

    def _by_value(self, module: nn.Module, name: str, ids: Tensor) -> Rows | None:
        """The rows of ids that the model made from the batch's, by their values."""
        around, embedding = self.calls[-1] if self.calls else None, isinstance(module, nn.Embedding)
        if not (name == "input_ids" or embedding) or not self.ids:
            return None
        lead = lead_of(ids)
        if embedding and around is not None and lead == around.lead and lead[0] != lead[-1]:
            return None  # as many as the text has, and not to be taken for its transpose: other ids of the same tokens
        for known, rows in self.ids:
            found = same_ids(ids, known, rows)
            if found is not None:
                return found
        return None

    def inside(self, x: Tensor, search: bool) -> Rows | None:
        """The rows of a tensor that was made inside the module that is running.

        Args:
            search: whether to look for its rows among those of the module's input, where nothing else is known.
        """
        call, lead = (self.calls[-1] if self.calls else None), lead_of(x)
        if call is None or call.lead is None or call.rows is None:
            return self._unplaced(x)
        width = x.shape[-1] if x.is_floating_point() else None
        main = call.main()
        if call.picks and len(lead) == 1 and width == call.width and main is not None and width is not None:
            return found_by_value(x, main, call.rows) or self._unknown(call.rows, x)
        if lead in call.made:
            return call.made[lead]
        if call.width is None and (copied := self._copied(x)) is not None:
            return copied
        if lead in self.frames and call.rows.stream != "decoder":
            return self.frames[lead]
        if call.rows.keep is None:
            return call.rows
        rows = self._by_lead(call, lead, width)
        if rows is None and search and width == call.width and width is not None and main is not None:
            rows = found_by_value(x, main, call.rows)
        return rows or self._unknown(call.rows, x)

    def _by_lead(self, call: Call, lead: torch.Size, width: int | None) -> Rows | None:
        """Find rows by the leading shape, for what is made inside a module whose input is known."""
        rows, own = call.rows, call.lead
        assert rows is not None and own is not None
        if lead == own:
            mixed = any(other.stream != rows.stream for _, other in call.others)
            if mixed and call.last is not None and call.last.keep is None and call.last.stream != rows.stream:
                return Rows(rows.stream, None, f"it could be {rows.stream} or {call.last.stream}, whose shapes agree")
            return rows
        other = next((found for shape, found in call.others if shape == lead), None)
        if other is not None:
            return other
        if len(own) == 2 and lead == own[:1]:
            return rows.per_sequence()
        if len(lead) > len(own) and lead[: len(own)] == own:
            return rows.expanded(lead)
        if is_flat(lead, own) and width is not None and width == call.width:
            call.made[lead] = rows.flattened()
            return call.made[lead]
        return None

    def _unplaced(self, x: Tensor) -> Rows | None:
        """Take a tensor at the model itself that is none of the batch's for the text, if it has the mask's shape."""
        text = self.streams.get("text")
        if text is not None and text.lead == lead_of(x):
            return text
        return self._copied(x)

    def _copied(self, x: Tensor) -> Rows | None:
        """The rows of one of the batch's tensors that the model has converted to another dtype (images, say)."""
        dtype, rows = self.unmasked.get(x.shape, (x.dtype, None))
        return rows if dtype != x.dtype and dtype.is_floating_point and x.is_floating_point() else None

    def _unknown(self, rows: Rows, x: Tensor) -> Rows:
        shape = "×".join(map(str, lead_of(x)))
        return self.without(f"{rows.stream}?", f"its {shape} rows could not be traced to the tokens of {rows.stream!r}")

    # --- the sites -------------------------------------------------------------------------------------------

    def at(self, site: str, x: Tensor) -> Rows:
        """The rows of a site's input."""
        rows = self.known(x)
        if rows is None:
            rows = self.inside(x, search=True)
        if rows is None:
            rows = self.without("?", self.masks.unusable or "no mask has the shape of what it sees")
        if rows.keep is None:
            rows = self._given("frames" if rows.stream.startswith("input_") else rows.stream, lead_of(x)) or rows
        own = self.masks.sites.get(site)
        if site not in self.masks.sites:
            return rows
        if own is None:
            return Rows(rows.stream, None, "")
        lead = lead_of(x)
        if own.shape == lead or is_flat(lead, own.shape):
            return Rows(rows.stream, own.reshape(lead), "token_mask of the site")
        raise ValueError(
            f"site {site}: token_mask gave it a mask {tuple(own.shape)}, and its input is {tuple(x.shape)}; give one "
            f"of shape {tuple(lead)}"
        )


@contextmanager
def following(model: Anatomy, streams: Streams | None) -> Iterator[None]:
    """Hooks on the modules whose calls tell streams apart, removed on the way out; none without `streams`."""
    handles = []
    try:
        for module in model.followed if streams is not None else ():
            assert streams is not None
            handles.append(module.register_forward_pre_hook(streams.enter, with_kwargs=True))
            handles.append(module.register_forward_hook(streams.leave))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _nothing() -> None:
    return None


def _address(x: Tensor) -> int:
    """The address of the memory of a tensor; 0 for one without (on the meta device, empty, sparse or nested)."""
    return 0 if x.is_nested or x.layout is not torch.strided else x.untyped_storage().data_ptr()
