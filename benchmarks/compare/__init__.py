"""The paper's comparison in miniature: every system on the shipped pipeline, tuned alike, against time and images."""
