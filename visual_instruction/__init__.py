"""Visual instruction tuning: a LLaVA with LoRA or MoSLoRA on both towers, from data to Table 5 and Figure 5."""
