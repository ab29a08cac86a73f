/*-------------------------------------------------------------------------
 *
 * scan.c
 *	  The plan of a call in FROM.
 *
 * That is how an application begins a request, because it wants the columns of
 * the answer.  The server's node for functions in FROM is made for any number
 * of rows: it copies the row type three times, has a memory context and an
 * expression for each argument, stores the tuple that the function forms, as
 * another form of tuple, in a tuplestore, and gets it back from there.  That
 * is half of what it takes to find an answer.
 *
 * A call of ours returns one row.  So the planner is offered a custom scan,
 * which evaluates the call as an expression and takes the columns that the
 * query needs.  The expression does all that belongs to a call: it checks the
 * right to make it, evaluates the arguments, and counts it if functions are
 * tracked.  The row does not become a tuple at all (ResultCallInto() says how).
 *
 * What is left to the server's node, which does it as it always did:
 *
 *	- arguments that depend on other tables of the query, or are computed by
 *	  other parts of its plan.  They can change in the course of the query, and
 *	  the function has to be called again when they did.  Without them it is
 *	  called once, however often its row is read, just as by the server's node,
 *	  and what it leaves in memory can stay until the query ends.
 *	- queries that want the row as a whole, as those do that lock rows.
 *	- ROWS FROM with more than one function, and WITH ORDINALITY.
 *
 *-------------------------------------------------------------------------
 */
#include "idempotency.h"

#include "fmgr.h"
#include "nodes/extensible.h"
#include "nodes/makefuncs.h"
#include "nodes/nodeFuncs.h"
#include "optimizer/optimizer.h"
#include "optimizer/pathnode.h"
#include "optimizer/paths.h"
#include "optimizer/planmain.h"
#include "optimizer/restrictinfo.h"
#include "result.h"
#include "scan.h"
#include "utils/lsyscache.h"
#include "utils/ruleutils.h"

/* State of the node; its slot has the columns of its custom_scan_tlist */
typedef struct CallScanState
{
	CustomScanState custom;		/* must be first */
	ExprState  *call;			/* puts its result in row */
	ResultRow	row;
	bool		called;			/* the columns are in the slot */
	bool		returned;		/* and have been read */
} CallScanState;

static void offer_call_scan(PlannerInfo *root, RelOptInfo *rel, Index rti,
							RangeTblEntry *rte);
static FuncExpr *get_call(const RangeTblEntry *rte);
static bool is_supported(Oid function);
static bool may_change(Node *node, void *context);
static bool get_columns(const RelOptInfo *rel, List **columns);
static Plan *plan_call_scan(PlannerInfo *root, RelOptInfo *rel,
							CustomPath *path, List *tlist, List *clauses,
							List *custom_plans);
static Node *create_state(CustomScan *scan);
static void begin_scan(CustomScanState *node, EState *estate, int eflags);
static TupleTableSlot *exec_scan(CustomScanState *node);
static TupleTableSlot *next_row(ScanState *node);
static bool recheck_row(ScanState *node, TupleTableSlot *slot);
static void call_function(CallScanState *state);
static void end_scan(CustomScanState *node);
static void rescan(CustomScanState *node);
static void explain_scan(CustomScanState *node, List *ancestors,
						 ExplainState *es);

static const CustomPathMethods path_methods = {
	.CustomName = "Idempotency Call",
	.PlanCustomPath = plan_call_scan
};

static const CustomScanMethods scan_methods = {
	.CustomName = "Idempotency Call",
	.CreateCustomScanState = create_state
};

static const CustomExecMethods exec_methods = {
	.CustomName = "Idempotency Call",
	.BeginCustomScan = begin_scan,
	.ExecCustomScan = exec_scan,
	.EndCustomScan = end_scan,
	.ReScanCustomScan = rescan,
	.ExplainCustomScan = explain_scan
};

static set_rel_pathlist_hook_type previous_set_rel_pathlist_hook;

PG_FUNCTION_INFO_V1(idempotency_support);

/*
 * idempotency_support(internal) returns internal
 *
 * Planner support for begin, try_begin, replay and run, as CREATE FUNCTION's
 * SUPPORT names it.  It has no answer to any request of the planner; but it
 * marks the functions whose calls can be scanned, and to ask it makes the
 * planner load the library, before it looks for paths.
 */
Datum
idempotency_support(PG_FUNCTION_ARGS)
{
	PG_RETURN_POINTER(NULL);
}

/*
 * Have the planner ask us for paths.
 */
void
ScanInit(void)
{
	RegisterCustomScanMethods(&scan_methods);

	previous_set_rel_pathlist_hook = set_rel_pathlist_hook;
	set_rel_pathlist_hook = offer_call_scan;
}

/*
 * Offer a scan for a call of ours in FROM, if it can do what the query wants.
 */
static void
offer_call_scan(PlannerInfo *root, RelOptInfo *rel, Index rti,
				RangeTblEntry *rte)
{
	FuncExpr   *call;
	List	   *columns;
	CustomPath *path;

	if (previous_set_rel_pathlist_hook != NULL)
		previous_set_rel_pathlist_hook(root, rel, rti, rte);

	call = get_call(rte);
	if (call == NULL || !is_supported(call->funcid) || !ResultIsOf(call) ||
		!bms_is_empty(rel->lateral_relids) ||
		may_change((Node *) call->args, NULL) || !get_columns(rel, &columns))
		return;

	/* as the server's path, but for how */
	path = makeNode(CustomPath);
	path->path = *(Path *) linitial(rel->pathlist);
	path->path.type = T_CustomPath;
	path->path.pathtype = T_CustomScan;
	path->flags = CUSTOMPATH_SUPPORT_PROJECTION;
	path->custom_private = list_make2(call, columns);
	path->methods = &path_methods;

	/* there is no query for which the server's is better */
	rel->pathlist = list_make1(path);
}

/*
 * The call, if a function is all that an entry of FROM has.
 */
static FuncExpr *
get_call(const RangeTblEntry *rte)
{
	Node	   *expr;

	if (rte->rtekind != RTE_FUNCTION || rte->funcordinality ||
		list_length(rte->functions) != 1)
		return NULL;

	expr = linitial_node(RangeTblFunction, rte->functions)->funcexpr;
	return IsA(expr, FuncExpr) ? castNode(FuncExpr, expr) : NULL;
}

/*
 * Whether a function has our support, by whatever names.
 */
static bool
is_supported(Oid function)
{
	RegProcedure support = get_func_support(function);
	FmgrInfo	flinfo;

	if (!RegProcedureIsValid(support))
		return false;
	fmgr_info(support, &flinfo);
	return flinfo.fn_addr == idempotency_support;
}

/*
 * Whether an expression may have another value later in the same query; a
 * volatile function does not count, because nothing but such a change has it
 * called again.
 */
static bool
may_change(Node *node, void *context)
{
	if (node == NULL)
		return false;
	if (IsA(node, Param))
		return castNode(Param, node)->paramkind != PARAM_EXTERN;
	if (IsA(node, Var) || IsA(node, PlaceHolderVar) ||
		IsA(node, SubPlan) || IsA(node, AlternativeSubPlan))
		return true;
	return expression_tree_walker(node, may_change, context);
}

/*
 * The columns that a query needs, each once.  Returns false if it needs the
 * whole row.
 */
static bool
get_columns(const RelOptInfo *rel, List **columns)
{
	List	   *exprs = list_copy(rel->reltarget->exprs);
	List	   *vars;
	ListCell   *lc;

	foreach(lc, rel->baserestrictinfo)
		exprs = lappend(exprs, lfirst_node(RestrictInfo, lc)->clause);

	*columns = NIL;
	vars = pull_var_clause((Node *) exprs, PVC_RECURSE_PLACEHOLDERS);
	foreach(lc, vars)
	{
		if (lfirst_node(Var, lc)->varattno <= 0)
			return false;
		*columns = list_append_unique(*columns, lfirst(lc));
	}
	return true;
}

/*
 * Make the plan node of a path.
 *
 * It is not said to scan the entry of FROM, because a custom scan can only be
 * said to scan a table.  So its target list, and that of the scan, which names
 * the columns of the slot, are all that tells where the columns are from.
 */
static Plan *
plan_call_scan(PlannerInfo *root, RelOptInfo *rel, CustomPath *path,
			   List *tlist, List *clauses, List *custom_plans)
{
	CustomScan *scan = makeNode(CustomScan);
	FuncExpr   *call = linitial_node(FuncExpr, path->custom_private);
	List	   *columns = lsecond_node(List, path->custom_private);
	ListCell   *lc;

	scan->scan.plan.targetlist = tlist;
	scan->scan.plan.qual = extract_actual_clauses(clauses, false);
	scan->flags = path->flags;
	scan->custom_exprs = list_make1(call);
	scan->methods = &scan_methods;

	foreach(lc, columns)
	{
		TargetEntry *column = makeTargetEntry(lfirst(lc),
											  foreach_current_index(lc) + 1,
											  NULL, false);

		scan->custom_scan_tlist = lappend(scan->custom_scan_tlist, column);
	}

	/* another function, of the same OID, could not be called in this way */
	record_plan_function_dependency(root, call->funcid);

	return &scan->scan.plan;
}

static Node *
create_state(CustomScan *scan)
{
	CallScanState *state = palloc0_object(CallScanState);

	NodeSetTag(state, T_CustomScanState);
	state->custom.methods = &exec_methods;
	return (Node *) state;
}

static void
begin_scan(CustomScanState *node, EState *estate, int eflags)
{
	CallScanState *state = (CallScanState *) node;
	CustomScan *scan = castNode(CustomScan, node->ss.ps.plan);
	FuncExpr   *call = linitial_node(FuncExpr, scan->custom_exprs);

	state->call = ExecInitExpr(ResultCallInto(call, &state->row),
							   &node->ss.ps);
}

static TupleTableSlot *
exec_scan(CustomScanState *node)
{
	return ExecScan(&node->ss, next_row, recheck_row);
}

/*
 * The row, the first time; then none.
 */
static TupleTableSlot *
next_row(ScanState *node)
{
	CallScanState *state = (CallScanState *) node;

	if (state->returned)
		return NULL;

	if (!state->called)
		call_function(state);
	state->called = true;
	state->returned = true;
	return node->ss_ScanTupleSlot;
}

/*
 * There is no later version of a row that is in no table.
 */
static bool
recheck_row(ScanState *node, TupleTableSlot *slot)
{
	return true;
}

/*
 * Call the function, and put the columns of its row in the slot.  They have to
 * stay until the query ends, for a rescan.
 */
static void
call_function(CallScanState *state)
{
	ScanState  *node = &state->custom.ss;
	List	   *columns = castNode(CustomScan, node->ps.plan)->custom_scan_tlist;
	TupleTableSlot *slot = node->ss_ScanTupleSlot;
	MemoryContext old_context;
	bool		isnull;
	ListCell   *lc;

	old_context = MemoryContextSwitchTo(node->ps.state->es_query_cxt);
	(void) ExecEvalExpr(state->call, node->ps.ps_ExprContext, &isnull);
	MemoryContextSwitchTo(old_context);

	foreach(lc, columns)
	{
		int			i = foreach_current_index(lc);
		int			column = castNode(Var, lfirst_node(TargetEntry, lc)->expr)->varattno;

		slot->tts_values[i] = state->row.values[column - 1];
		slot->tts_isnull[i] = state->row.nulls[column - 1];
	}
	ExecStoreVirtualTuple(slot);
}

static void
end_scan(CustomScanState *node)
{
	/* all that there is goes with the memory of the query */
}

/*
 * Read the row once more.
 */
static void
rescan(CustomScanState *node)
{
	((CallScanState *) node)->returned = false;
}

/*
 * Say what is called, in the way of the server's node.
 */
static void
explain_scan(CustomScanState *node, List *ancestors, ExplainState *es)
{
	CustomScan *scan = castNode(CustomScan, node->ss.ps.plan);
	List	   *context;

	if (!es->verbose)
		return;

	context = set_deparse_context_plan(es->deparse_cxt, &scan->scan.plan,
									   ancestors);
	ExplainPropertyText("Function Call",
						deparse_expression(linitial(scan->custom_exprs),
										   context, false, false), es);
}
