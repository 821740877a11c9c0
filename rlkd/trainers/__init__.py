"""Trainers on transformers.Trainer: supervised distillation, REINFORCE and PPO."""
