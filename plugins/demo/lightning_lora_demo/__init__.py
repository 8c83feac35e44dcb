"""A page on this machine that classifies texts by one run or several side by side."""
