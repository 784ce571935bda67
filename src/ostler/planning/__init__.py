"""Consolidation: which guests belong on which hosts, so that the fewest hosts run.

The model (`estate`) knows no solver, the solver (`solve`) no presentation; `check` judges a placement by the rules
alone. Apart from `history`, which keeps what hosts measured, nothing here touches a guest.
"""
