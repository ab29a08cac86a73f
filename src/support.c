/*-------------------------------------------------------------------------
 *
 * support.c
 *	  What the planner is told about the calls of an application.
 *
 * A function that is called in FROM has an expression for each of its
 * arguments, which the executor makes ready and evaluates one by one in every
 * execution of a statement, also for an argument that was not given and has
 * its default.  That is a tenth of what a begin that replays takes, and what
 * most calls do not give are the last arguments, whose default is null.
 *
 * So the planner is asked to leave out trailing arguments that are null
 * constants.  A function learns from fcinfo how many arguments it got; the
 * functions with this support take those that are missing for null, by
 * CALL_ARGISNULL().
 *
 *-------------------------------------------------------------------------
 */
#include "idempotency.h"

#include "nodes/nodeFuncs.h"
#include "nodes/supportnodes.h"

static int	count_arguments(const FuncExpr *call);

PG_FUNCTION_INFO_V1(idempotency_support);

/*
 * idempotency_support(internal) returns internal
 *
 * Planner support for begin, try_begin, replay and run, as CREATE FUNCTION's
 * SUPPORT names it: takes a request of the planner, and returns the simplified
 * call, or null when there is nothing to simplify.
 */
Datum
idempotency_support(PG_FUNCTION_ARGS)
{
	Node	   *request = (Node *) PG_GETARG_POINTER(0);
	FuncExpr   *call;
	int			count;

	if (!IsA(request, SupportRequestSimplify))
		PG_RETURN_POINTER(NULL);

	call = ((SupportRequestSimplify *) request)->fcall;
	count = count_arguments(call);
	if (count == list_length(call->args))
		PG_RETURN_POINTER(NULL);

	call = copyObject(call);
	call->args = list_truncate(call->args, count);
	PG_RETURN_POINTER(call);
}

/*
 * The number of arguments up to the last that is not a null constant.
 */
static int
count_arguments(const FuncExpr *call)
{
	int			count = list_length(call->args);

	while (count > 0)
	{
		Node	   *argument = list_nth(call->args, count - 1);

		if (!IsA(argument, Const) || !castNode(Const, argument)->constisnull)
			break;
		count--;
	}
	return count;
}
