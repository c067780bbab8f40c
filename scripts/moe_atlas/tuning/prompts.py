"""How an instruction and a multiple-choice question are written. Nothing here imports torch."""

LETTERS = ("A", "B", "C", "D")

# The prompts of Stanford Alpaca, which the released code takes over.
_BELOW = "Below is an instruction that describes a task"
_WRITE = "Write a response that appropriately completes the request."


def prompt(instruction: str, given: str) -> str:
    """The prompt that a response follows, with or without an input."""
    if given:
        begun = f"{_BELOW}, paired with an input that provides further context. {_WRITE}"
        return f"{begun}\n\n### Instruction:\n{instruction}\n\n### Input:\n{given}\n\n### Response:"
    return f"{_BELOW}. {_WRITE}\n\n### Instruction:\n{instruction}\n\n### Response:"


def heading(subject: str) -> str:
    """What stands before the shots of a subject (Hendrycks et al. 2021, arXiv 2009.03300)."""
    return f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"


def question(text: str, choices: list[str]) -> str:
    """A question with its choices, up to where the letter follows."""
    lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=True)]
    return "\n".join([text.strip(), *lines, "Answer:"])
