"""Expert banks, and the model classes that transformers lacks.

Importing this package imports neither torch nor transformers.
"""


def register() -> None:
    """Make the Auto classes of transformers know "deepseek" (DeepSeekMoE v1), "grok-1" and "grok" (two ports of one).

    Calling it twice changes nothing.
    """
    from moe_atlas.architectures import deepseek, grok, grok_keyfan

    for family in (deepseek, grok, grok_keyfan):
        family.register()
