"""The kind of a site by its name: query, key, value, out and so on, and how deep it lies."""

from __future__ import annotations

import re

KINDS: tuple[tuple[str, str], ...] = (
    ("qkv", r"(c_attn|qkv|query_key_value|qkv_proj|in_proj|Wqkv)"),
    ("query", r"(query|q_proj|to_q|q_lin|add_q_proj|wq|q|SelfAttention\.q|EncDecAttention\.q)"),
    ("key", r"(key|k_proj|to_k|k_lin|add_k_proj|wk|k)"),
    ("value", r"(value|v_proj|to_v|v_lin|add_v_proj|wv|v)"),
    ("out", r"(o_proj|out_proj|to_out(\.\d+)?|to_add_out|out_lin|attn\.(c_)?proj|attention\.(output\.)?dense|wo|o)"),
    ("up", r"(up_proj|gate_proj|fc1|fc_in|c_fc|intermediate\.dense|dense_h_to_4h|lin1|wi(_\d)?|w1|w3|proj_in)"),
    ("down", r"(down_proj|fc2|fc_out|c_proj|output\.dense|dense_4h_to_h|lin2|w2|proj_out)"),
)
"""Kind and the endings of module names that mean it; the first that fits counts."""


def kind_of(name: str) -> str:
    """The kind of projection that a module name stands for; its last part where none is known."""
    for kind, endings in KINDS:
        if re.search(rf"(^|\.){endings}$", name):
            return kind
    return name.rpartition(".")[2]


def depth_of(name: str) -> int:
    """The index of the layer: the first whole number among the parts of the name; 0 where there is none."""
    return next((int(part) for part in name.split(".") if part.isdecimal()), 0)
