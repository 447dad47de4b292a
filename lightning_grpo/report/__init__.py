"""Reports of runs: one HTML file with charts, findings and samples, which needs neither a network nor a server."""
