"""Where an iteration's time, memory and energy go: measured, counted and put on one page.

`work` counts FLOPs, for every training run too; `recorder`, `trace` and `power` measure; `report` holds the numbers;
`page` and `compare` show them. `python -m dgpo_fast.profile` is the command.
"""
