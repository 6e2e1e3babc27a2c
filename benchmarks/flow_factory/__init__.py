"""Our trainer beside Flow-Factory's DGPO, at equal work on a CPU."""
