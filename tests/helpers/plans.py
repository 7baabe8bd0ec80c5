"""Plans with round figures."""

from dataclasses import replace
from typing import Any

from moeflow.fit.plan import Plan

_SMALL = Plan(
    model="0123456789abcdef",
    model_type="mixtral",
    stored="float32",
    machine="a processor, 2 cores",
    memory_bytes=10**10,
    context=64,
    batch=1,
    lines={
        "dense": 300_000,
        "experts": 200_000,
        "key_values": 100_000,
        "activations": 10**6,
        "workspace": 10**6,
        "pinned": 8 << 20,
        "process": 4 * 10**9,
    },
    options={"device": "cpu", "expert_memory": 200_000, "kv_memory": 100_000},
    expected={
        "prefill_tok_s": [80.0, 100.0, 125.0],
        "decode_tok_s": [8.0, 10.0, 12.5],
        "hit_rate": [0.4, 0.5, 0.6],
        "prompt_tokens": 32,
        "curve": "the demo model",
    },
)


def small_plan(**fields: Any) -> Plan:
    """Return the plan with other fields in some places."""
    return replace(_SMALL, **fields)
