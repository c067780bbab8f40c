"""Expert banks, and the model classes that transformers lacks.

Importing this package imports neither torch nor transformers.
"""

# Model types whose layers have attention experts.
ATTENTION_EXPERTS = ("jetmoe", "moa")


def register() -> None:
    """Make the Auto classes know "deepseek" (DeepSeekMoE v1), "grok-1" and "grok" (two ports of one), "emoe", "moa".

    Calling it twice changes nothing.
    """
    from moe_atlas.architectures import deepseek, emoe, grok, grok_keyfan, moa_models

    for family in (deepseek, emoe, grok, grok_keyfan, moa_models):
        family.register()
