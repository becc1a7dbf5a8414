(component
)
