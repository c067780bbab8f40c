"""Expert banks, and the model classes that transformers lacks.

Importing this package imports neither torch nor transformers.
"""


def register() -> None:
    """Make the Auto classes of transformers know "deepseek" (DeepSeekMoE v1) and "grok-1".

    Calling it twice changes nothing.
    """
    from moe_atlas.architectures import deepseek, grok

    deepseek.register()
    grok.register()
