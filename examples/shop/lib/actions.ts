/** The names of all protected operations: a key belongs to one of them. */
export const actions = [
  'POST /api/orders', 'POST /api/payments', 'POST /api/refunds', 'POST /api/reservations',
  'createCheckoutSession', 'createPracticeSession', 'submitAnswer'
]
