"""Text tasks as Gymnasium environments in which every step is rewarded at once.

Importing the package registers them: ``gym.make("DialogueQA-v0")``.
"""

from llm_envs.core.registration import register, registered_ids

__version__ = "0.1.0"
__all__ = ["__version__", "register", "registered_ids"]

register("DialogueQA-v0", "llm_envs.tasks.dialogue_qa:DialogueQA")
register("Summarization-v0", "llm_envs.tasks.summarization:Summarization")
register("RecommendationClicks-v0", "llm_envs.tasks.recommendation_clicks:RecommendationClicks")
register("TextBattle-v0", "llm_envs.tasks.text_battle:TextBattle")
register("CustomerService-v0", "llm_envs.tasks.customer_service:CustomerService")
register("TextWorld-v0", "llm_envs.tasks.text_world:TextWorld")
