"""Families M01 to M33: model folders that are damaged, foreign or hostile."""
from faults.case import Case, edit, remove

CONFIG = "model/config.json"


def cases() -> list[Case]:
    return [
        Case("M00 nothing is wrong, generate", "generate", None, oracle="V"),
        Case("M00 nothing is wrong, train", "train", None, oracle="V", words="uft"),
        Case("M00 nothing is wrong, evaluate", "evaluate", None, oracle="V", words="40 rows"),
        Case("M00 nothing is wrong, merge", "lora", None, oracle="V", words="14 layers merged"),
        Case("M01 no config.json", "train", remove(CONFIG), words="config.json is missing"),
        Case("M05 eps is NaN", "train", edit(CONFIG, rms_norm_eps=float("nan")),
             words="rms_norm_eps; nan"),
    ]
