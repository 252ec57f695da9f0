"""One job's ranks as processes, and how they find each other; the ground of all launchers."""
