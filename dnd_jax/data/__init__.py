"""Questions and answers: sources, suites, the embedded one, the data report, and the texts of a
condition."""
