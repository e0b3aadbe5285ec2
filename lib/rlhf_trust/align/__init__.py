"""Training stages: from a base model to SFT, reward model, PPO, DPO and INPO."""
