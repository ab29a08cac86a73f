// Sequelize.
import { DataTypes, Sequelize } from 'sequelize'
import { fromSequelize, sequelizeDatabase } from 'pg-idempotency/orm'

export async function open (url) {
  const sequelize = new Sequelize(url, { logging: false, pool: { max: 4 } })
  const Order = sequelize.define('Order', { name: DataTypes.TEXT }, { tableName: 'orders', timestamps: false })
  return {
    database: options => sequelizeDatabase(sequelize, options),
    queryable: transaction => fromSequelize(sequelize, transaction),
    transaction: work => sequelize.transaction(work),
    insert: async (transaction, name) => await Order.create({ name }, { transaction }),
    serializable: 'SERIALIZABLE',
    close: async () => await sequelize.close()
  }
}
