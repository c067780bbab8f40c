"""Expert banks, and the model classes that transformers lacks.

Importing this package imports neither torch nor transformers.
"""


def register() -> None:
    """Make the Auto classes know "deepseek" (DeepSeekMoE v1), "grok-1" and "grok" (two ports of one), and "emoe".

    Calling it twice changes nothing.
    """
    from moe_atlas.architectures import deepseek, emoe, grok, grok_keyfan

    for family in (deepseek, emoe, grok, grok_keyfan):
        family.register()
