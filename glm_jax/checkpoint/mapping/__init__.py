"""From checkpoint tensor names to the parameter tree: one rule per tensor."""
