/** Answers of 4xx, as `application/problem+json`, RFC 9457. */

import { STATUS_CODES } from 'node:http'

/** The status for a key that was used with a different request, as the ticket has it. */
export const mismatchStatus = 409

/** @param code a name for programs, such as `OUT_OF_STOCK` */
export function problem (status: number, code: string, detail: string): Response {
  return Response.json({ type: 'about:blank', title: STATUS_CODES[status], status, detail, code }, {
    status,
    headers: { 'content-type': 'application/problem+json; charset=utf-8' }
  })
}
