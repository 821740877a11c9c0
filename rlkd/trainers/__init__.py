"""Trainers on transformers.Trainer: supervised warm-up, REINFORCE and PPO, and what the recipes build them from."""
