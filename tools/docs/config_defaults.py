"""Write opd_mcp/identity/config_defaults.json: the values that transformers uses where a config.json has none.

    python tools/docs/config_defaults.py

The file defines identities, so it only ever gains families: another default here would give the models of old artifacts
another identity. `tests/identity/test_configuration.py` compares it with the installed transformers.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from opd_mcp.identity.configuration import DECIDES_NOTHING, DEFAULTS_FILE

FAMILIES = ("gemma", "gemma2", "granite", "llama", "mistral", "olmo2", "qwen2", "qwen3", "qwen3_moe")


def family_defaults(model_type: str) -> dict[str, Any]:
    """A family's own defaults, with the base of its rotary positions under `rope_theta`; null where it derives one."""
    kind = CONFIG_MAPPING[model_type]
    common = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    values = {
        field.name: field.default
        for field in dataclasses.fields(kind)
        if field.name not in common | DECIDES_NOTHING | {"rope_parameters"} and field.default is not dataclasses.MISSING
    }
    return {**values, "rope_theta": kind.default_theta}


if __name__ == "__main__":
    argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0]).parse_args()
    defaults = {family: family_defaults(family) for family in FAMILIES}
    lines = [f"  {json.dumps(name)}: {json.dumps(values, sort_keys=True)}" for name, values in defaults.items()]
    Path(DEFAULTS_FILE).write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
