// TypeORM.
import 'reflect-metadata'
import { DataSource, EntitySchema } from 'typeorm'
import { fromTypeOrm, typeOrmDatabase } from 'pg-idempotency/orm'

const Order = new EntitySchema({
  name: 'Order',
  tableName: 'orders',
  columns: { id: { type: Number, primary: true, generated: true }, name: { type: String } }
})

export async function open (url) {
  const dataSource = new DataSource({ type: 'postgres', url, entities: [Order], poolSize: 4, logging: false })
  await dataSource.initialize()
  return {
    database: options => typeOrmDatabase(dataSource, options),
    nested: manager => typeOrmDatabase(manager),
    queryable: fromTypeOrm,
    transaction: work => dataSource.transaction(work),
    insert: async (manager, name) => await manager.insert(Order, { name }),
    serializable: 'SERIALIZABLE',
    close: async () => await dataSource.destroy()
  }
}
