"""Where lorakern meets other software: each module is the only one that imports its engine."""
