"""The operations in a profile of a GPU."""

import jax

from glm_jax.bench.profiler import summarize_operations

PROFILE = """
planes { id: 1 name: "/device:GPU:0"
  event_metadata { key: 1 value { id: 1 name: "down_kernel" } }
  event_metadata { key: 2 value { id: 2 name: "loop_add_fusion_12" } }
  event_metadata { key: 3 value { id: 3 name: "loop_add_fusion.3" } }
  lines { id: 1 name: "Stream #7(Compute)"
    events { metadata_id: 1 duration_ps: 4000000 } events { metadata_id: 1 duration_ps: 6000000 }
    events { metadata_id: 2 duration_ps: 1000000 } events { metadata_id: 3 duration_ps: 1000000 } }
  lines { id: 2 name: "XLA Ops" events { metadata_id: 1 duration_ps: 4000000 } } }
planes { id: 2 name: "/host:CPU" event_metadata { key: 1 value { id: 1 name: "x" } }
  lines { id: 1 name: "Stream #1" events { metadata_id: 1 duration_ps: 4000000 } } }
"""


def test_operations_come_from_the_streams_of_the_first_gpu():
    data = jax.profiler.ProfileData
    profile = summarize_operations(data.from_serialized_xspace(data.text_proto_to_serialized_xspace(PROFILE)), steps=2)
    assert profile == {
        "launches": 2.0,
        "us": 6.0,
        "operations": [
            {"name": "down_kernel", "count": 1.0, "us": 5.0},
            {"name": "loop_add_fusion", "count": 1.0, "us": 1.0},
        ],
    }
    nothing = data.text_proto_to_serialized_xspace('planes { name: "/host:CPU" }')
    assert summarize_operations(data.from_serialized_xspace(nothing), 1) is None
