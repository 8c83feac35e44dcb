"""What an ablation asks and what its cells say: plan, lint, results. Imports no torch and runs nothing."""
